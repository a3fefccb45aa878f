package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

const limit = 4194304 // [F2]

// go_client harness PATH    listens there, and serves one session
// go_client guest ... --env FILE ...    is the guest of a session
func main() {
	var err error
	if len(os.Args) == 3 && os.Args[1] == "harness" {
		err = harness(os.Args[2])
	} else {
		err = guest(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "go_client:", err)
		os.Exit(1)
	}
}

// A Wire is messages over a stream.
type Wire struct {
	stream  net.Conn
	framing Framing
	besides map[string]members
	waiting [][]byte
}

func (w *Wire) Send(message Object) error {
	payload, err := json.Marshal(message)
	if err != nil {
		return err
	}
	frame, err := w.framing.Encode(payload)
	if err != nil {
		return err
	}
	_, err = w.stream.Write(frame)
	return err
}

// Receive returns the next message, checked.
func (w *Wire) Receive() (Object, error) {
	piece := make([]byte, 65536)
	for len(w.waiting) == 0 {
		n, err := w.stream.Read(piece)
		if err != nil {
			return nil, err
		}
		if w.waiting, err = w.framing.Feed(piece[:n]); err != nil {
			return nil, err
		}
	}
	payload := w.waiting[0]
	w.waiting = w.waiting[1:]
	message, err := Parse(payload, 64)
	if err == nil {
		err = Check(message, w.besides)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, payload)
	}
	return message, nil
}

// Expect returns the next message, which is of that kind. A ping is answered [M7].
func (w *Wire) Expect(kind string) (Object, error) {
	for {
		message, err := w.Receive()
		if err != nil {
			return nil, err
		}
		if message["kind"] == "ping" {
			if err := w.Send(Object{"kind": "pong", "nonce": message["nonce"]}); err != nil {
				return nil, err
			}
			continue
		}
		if message["kind"] != kind {
			return nil, fmt.Errorf("%v instead of %s", message, kind)
		}
		return message, nil
	}
}

// harness answers what is asked, and ends the session after the second prompt. It says what it heard.
func harness(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	stream, err := listener.Accept()
	if err != nil {
		return err
	}
	stream.SetDeadline(time.Now().Add(120 * time.Second))
	wire := &Wire{stream: stream, framing: &LengthPrefixed{Limit: limit}, besides: toHarness}
	open, err := wire.Expect("session.open") // [S1]
	if err != nil {
		return err
	}
	fmt.Println("session.open", open["session"], open["build"], open["capabilities"])
	for prompts := 0; ; {
		message, err := wire.Receive()
		if err != nil {
			return err
		}
		fmt.Println(message["kind"], message["id"], message["tool"], message["text"], message["outcome"])
		var answer Object
		switch message["kind"] {
		case "tool.invoke":
			answer = Object{"kind": "tool.result", "id": message["id"], "result": Object{"by": "go", "<&>": "\u00e4"}}
		case "prompt":
			prompts++
			answer = Object{"kind": "prompt.result", "id": message["id"], "text": "<go> & on"}
		case "session.close":
			return nil
		}
		if answer != nil {
			if err := wire.Send(answer); err != nil {
				return err
			}
		}
		if prompts == 2 && answer != nil {
			if err := wire.Send(Object{"kind": "end"}); err != nil { // [S3]
				return err
			}
			prompts++
		}
	}
}

// guest says hello, asks for what it may not and for what it may, and leaves when it is asked to.
func guest(words []string) error {
	variables, err := environment(words)
	if err != nil {
		return err
	}
	path := strings.TrimPrefix(variables["KENAZ_CHANNEL"], "unix:")
	stream, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	wire := &Wire{stream: stream, framing: &LengthPrefixed{Limit: limit}, besides: toGuest}
	hello := Object{"kind": "hello", "protocol": 1, "session": variables["KENAZ_SESSION_ID"],
		"token": variables["HARNESS_VM_TOKEN"], "agent": "go_client/1", "build": variables["KENAZ_WORKBENCH_BUILD"],
		"capabilities": []string{"tools", "prompts", "telepathy"}}
	steps := []struct {
		say    Object
		answer string
	}{
		{hello, "welcome"},
		{Object{"kind": "ping", "nonce": "go:1"}, "pong"},
		{Object{"kind": "tool.invoke", "id": "t1", "tool": "fs.delete", "arguments": Object{}}, "tool.error"},
		{Object{"kind": "tool.invoke", "id": "t1", "tool": "fs.read", "arguments": Object{"<": "\u00e4"}}, "tool.result"},
		{Object{"kind": "prompt", "id": "p1", "text": "one"}, "prompt.result"},
		{Object{"kind": "prompt", "id": "p2", "text": "two"}, "prompt.result"},
	}
	for _, step := range steps {
		if err := wire.Send(step.say); err != nil {
			return err
		}
		answer, err := wire.Expect(step.answer)
		if err != nil {
			return err
		}
		fmt.Println("go_client:", answer["kind"], answer["code"], answer["capabilities"])
	}
	if _, err := wire.Expect("drain"); err != nil { // [E1]
		return err
	}
	return wire.Send(Object{"kind": "bye", "reason": "drained"})
}

// environment reads the boot parameters: NAME="value" lines, with backslashes before what needs them.
func environment(words []string) (map[string]string, error) {
	variables := map[string]string{}
	for n, word := range words[:len(words)-1] {
		if word != "--env" {
			continue
		}
		file, err := os.Open(words[n+1])
		if err != nil {
			return nil, err
		}
		defer file.Close()
		for lines := bufio.NewScanner(file); lines.Scan(); {
			name, value, _ := strings.Cut(lines.Text(), "=")
			value = strings.TrimSuffix(strings.TrimPrefix(value, `"`), `"`)
			variables[name] = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\$`, `$`, "\\`", "`").Replace(value)
		}
	}
	return variables, nil
}
