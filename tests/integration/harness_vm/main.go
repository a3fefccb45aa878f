// A stand-in for today's harness-vm: what listens on port 7881 in the guest. Written from the description of
// that program's behaviour, with the traps that a launcher has to know; see docs/reference/vsock-protocol.md,
// rules G. It calls no model: what a task does is said by its prompt.
//
//	echo TEXT     two task.running (the prompt, then TEXT), then task.complete
//	wait          runs until it is cancelled
//	ask           asks for an approval, where that was granted; its text is the decision
//	fail          ends by task.error graph_run_failed
//	drop          closes the connection in the middle of the task
package main

import (
	"bufio"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

type object = map[string]interface{}

func main() {
	port := os.Getenv("HARNESS_VM_PORT")
	if port == "" {
		port = "7881"
	}
	listener, err := net.Listen("tcp", "0.0.0.0:"+port)
	if err != nil {
		fmt.Fprintln(os.Stderr, "harness-vm:", err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "harness-vm: listening")
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		go (&server{connection: connection, decisions: map[string]chan string{}}).serve()
	}
}

// One connection: at most one task runs on it.
type server struct {
	connection net.Conn
	approves   bool

	mutex     sync.Mutex // of all below, and of writing: lines never interleave
	cancel    chan struct{}
	asked     int
	decisions map[string]chan string
}

// Trap: a map is marshalled with its keys in alphabetical order, and <, > and & as escapes.
func (s *server) send(message object) {
	line, err := json.Marshal(message)
	if err != nil {
		panic(err)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.connection.Write(append(line, '\n'))
}

func truncated(text string) string {
	if runes := []rune(text); len(runes) > 512 {
		return string(runes[:512]) + "..."
	}
	return text
}

func (s *server) taskError(task, code, text string) {
	message := object{"kind": "task.error", "code": code, "message_truncated": truncated(text)}
	if task != "" {
		message["task_id"] = task
	}
	s.send(message)
}

func (s *server) serve() {
	defer s.connection.Close()
	// Trap: the default scanner ends without a word at a line of more than 64 KiB, its newline included.
	lines := bufio.NewScanner(s.connection)
	if !lines.Scan() || !s.authenticate(lines.Bytes()) {
		return
	}
	for lines.Scan() {
		var message object
		// Trap: a blank line is an error too. No heartbeat is sent or expected.
		if json.Unmarshal(lines.Bytes(), &message) != nil {
			s.taskError("", "bad_request", "bad json")
			continue
		}
		s.handle(message)
	}
	// Trap: closing the connection does not cancel the task; it runs on with nobody listening.
}

func (s *server) authenticate(line []byte) bool {
	refuse := func(why string) bool {
		s.send(object{"kind": "auth.error", "message_truncated": why})
		return false
	}
	var auth struct {
		Kind         string      `json:"kind"`
		Token        string      `json:"token"`
		Capabilities interface{} `json:"capabilities"`
	}
	if json.Unmarshal(line, &auth) != nil {
		return refuse("bad json")
	}
	if auth.Kind != "auth" {
		return refuse("expected auth message")
	}
	// Trap: without a token of its own it lets anybody in.
	if token := os.Getenv("HARNESS_VM_TOKEN"); token != "" &&
		subtle.ConstantTimeCompare([]byte(token), []byte(auth.Token)) != 1 {
		return refuse("invalid token")
	}
	asked, _ := auth.Capabilities.([]interface{})
	for _, word := range asked {
		s.approves = s.approves || word == "approval"
	}
	answer := object{"kind": "auth.ok"}
	if s.approves {
		answer["capabilities"] = []string{"approval"}
	}
	s.send(answer)
	return true
}

func text(message object, member string) string {
	value, _ := message[member].(string)
	return value
}

func (s *server) handle(message object) {
	kind, task := text(message, "kind"), text(message, "task_id")
	switch kind {
	case "task.start":
		s.start(task, message)
	case "task.cancel":
		// Trap: the id is ignored. Whatever runs is cancelled; where nothing does, nothing is said.
		s.mutex.Lock()
		if s.cancel != nil {
			close(s.cancel)
			s.cancel = nil
		}
		s.mutex.Unlock()
	case "task.approval_decision":
		s.decide(message)
	case "sessions.list":
		s.answer(message, "sessions", []object{{"id": "c1", "name": "a <b> & c", "createdAt": "", "updatedAt": ""}})
	case "sessions.list_messages":
		// Trap: one line of more than 2 MiB.
		messages := make([]object, 500)
		for n := range messages {
			messages[n] = object{"id": fmt.Sprint(n), "role": "user", "content": strings.Repeat("x", 4096), "createdAt": ""}
		}
		s.answer(message, "messages", messages)
	case "tools.list":
		tools := []object{}
		for _, name := range strings.Split(os.Getenv("KENAZ_MCP_ALLOWLIST"), ",") {
			tools = append(tools, object{"name": name, "kind": "mcp", "enabled": true})
		}
		s.answer(message, "tools", tools)
	case "providers.list":
		s.send(object{"kind": kind + ".error", "req_id": text(message, "req_id"), "code": "unavailable",
			"message_truncated": "read bootstrap failed"})
	default:
		s.taskError("", "bad_request", "unknown kind "+kind)
	}
}

func (s *server) answer(message object, member string, items interface{}) {
	s.send(object{"kind": text(message, "kind") + ".ok", "req_id": text(message, "req_id"), member: items})
}

func (s *server) start(task string, message object) {
	if task == "" {
		s.taskError("", "bad_request", "task_id is required")
		return
	}
	params, _ := message["run_params"].(object)
	switch tier := text(params, "autonomy_tier"); tier {
	case "", "strict", "cautious", "default", "bold", "autonomous":
	default:
		s.taskError(task, "bad_request", "unknown autonomy_tier "+tier)
		return
	}
	if preset := text(params, "workflow_preset"); preset != "" {
		s.taskError(task, "unknown_preset", preset)
		return
	}
	s.mutex.Lock()
	running := s.cancel != nil
	cancelled := make(chan struct{})
	if !running {
		s.cancel = cancelled
	}
	s.mutex.Unlock()
	if running {
		s.taskError(task, "task_conflict", "a task already runs")
		return
	}
	go s.run(task, text(message, "prompt"), cancelled)
}

func (s *server) run(task, prompt string, cancelled chan struct{}) {
	word, rest, _ := strings.Cut(prompt, " ")
	output := []string{prompt, rest}
	switch word {
	case "wait":
		<-cancelled
	case "ask":
		output = []string{s.ask(task)}
	case "drop":
		s.connection.Close()
		return
	}
	// Trap: busy is cleared before the terminal line is written, and a cancel wins over all else.
	s.mutex.Lock()
	over := s.cancel != cancelled
	if !over {
		s.cancel = nil
	}
	s.mutex.Unlock()
	switch {
	case over:
		s.send(object{"kind": "task.cancelled", "task_id": task})
	case word == "fail":
		s.taskError(task, "graph_run_failed", strings.Repeat("long ", 200))
	default:
		for _, text := range output {
			s.send(object{"kind": "task.running", "task_id": task, "text": text})
		}
		s.send(object{"kind": "task.complete", "task_id": task})
	}
}

func now() string { return time.Now().UTC().Format("2006-01-02T15:04:05.000Z") }

func (s *server) ask(task string) string {
	if !s.approves {
		return "not asked"
	}
	s.mutex.Lock()
	s.asked++
	approval := fmt.Sprintf("rid-%024x", s.asked)
	decided := make(chan string, 1)
	s.decisions[approval] = decided
	s.mutex.Unlock()
	s.send(object{"kind": "task.approval_requested", "task_id": task, "approval_id": approval, "family": "bash",
		"action_kind": "bash.run", "summary": "rm -rf <all> & more", "dangerous": true, "requested_at": now(),
		"deadline_at": now(), "timeout_s": 300})
	decision := <-decided
	s.send(object{"kind": "task.approval_resolved", "task_id": task, "approval_id": approval,
		"decision": decision, "source": "host", "resolved_at": now(), "latency_ms": 1})
	return decision
}

func (s *server) decide(message object) {
	decision := text(message, "decision")
	switch decision {
	case "allow_once", "allow_always", "deny":
	default:
		s.taskError("", "bad_request", "unknown decision")
		return
	}
	s.mutex.Lock()
	waiting := s.decisions[text(message, "approval_id")]
	delete(s.decisions, text(message, "approval_id"))
	s.mutex.Unlock()
	if waiting != nil { // a late or unknown decision gets no reply
		waiting <- decision
	}
}
