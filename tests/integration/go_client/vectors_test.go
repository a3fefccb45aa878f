package main

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

type vectors struct {
	Kind, Framing, Dialect string
	Decode                 []struct {
		Name, Bytes string
		Limit       int
		Payloads    []string
		Error, End  Breach
	}
	Encode []struct {
		Name, Payload string
		Limit         int
		Bytes         *string
		Error         Breach
	}
	Payloads []struct {
		Name, Payload string
		Depth         int
		Error         Breach
	}
	Conversations []struct {
		Name  string
		Steps []struct {
			From, To, End string
			Payload       *string
			Made          Object
			Code          Breach
		}
	}
}

func read(t *testing.T, kind string, each func(t *testing.T, v vectors)) {
	paths, _ := filepath.Glob("../../../specs/kenaz_specs/protocol/vectors/*.json")
	found := 0
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var v vectors
		if err := json.Unmarshal(content, &v); err != nil {
			t.Fatal(err)
		}
		if v.Kind == kind {
			found++
			t.Run(filepath.Base(path), func(t *testing.T) { each(t, v) })
		}
	}
	if found == 0 {
		t.Fatal("no vectors")
	}
}

func framing(v vectors, limit int) Framing {
	if v.Framing == "ndjson" {
		return &Lines{LimitIn: limit, LimitOut: limit}
	}
	return &LengthPrefixed{Limit: limit}
}

func code_of(err error) Breach {
	if err == nil {
		return ""
	}
	return err.(Breach)
}

func TestFraming(t *testing.T) {
	read(t, "framing", func(t *testing.T, v vectors) {
		for _, c := range v.Decode {
			data, _ := hex.DecodeString(c.Bytes)
			for _, size := range []int{1, 3, len(data) + 1} {
				codec := framing(v, c.Limit)
				var got []string
				var err error
				for at := 0; at < len(data); at += size {
					end := at + size
					if end > len(data) {
						end = len(data)
					}
					var payloads [][]byte
					payloads, err = codec.Feed(data[at:end])
					for _, payload := range payloads {
						got = append(got, hex.EncodeToString(payload))
					}
				}
				if code_of(err) != c.Error || len(got) != len(c.Payloads) {
					t.Fatalf("%s: %v %v", c.Name, got, err)
				}
				for n := range got {
					if got[n] != c.Payloads[n] {
						t.Errorf("%s: %s", c.Name, got[n])
					}
				}
				if c.Error == "" && code_of(codec.End()) != c.End {
					t.Errorf("%s: ends by %v", c.Name, codec.End())
				}
			}
		}
		for _, c := range v.Encode {
			payload, _ := hex.DecodeString(c.Payload)
			frame, err := framing(v, c.Limit).Encode(payload)
			if code_of(err) != c.Error || (c.Bytes != nil && hex.EncodeToString(frame) != *c.Bytes) {
				t.Errorf("%s: %x %v", c.Name, frame, err)
			}
		}
	})
}

func TestJSON(t *testing.T) {
	read(t, "json", func(t *testing.T, v vectors) {
		for _, c := range v.Payloads {
			payload, _ := hex.DecodeString(c.Payload)
			if _, err := Parse(payload, c.Depth); code_of(err) != c.Error {
				t.Errorf("%s: %v", c.Name, err)
			}
		}
	})
}

// Of a conversation a client sees what is said to it: all of that must be messages by its own tables. What a
// peer says must be one too, but for the last word before the launcher finds a fault that shows by itself.
func TestConversations(t *testing.T) {
	own := map[Breach]bool{"bad_json": true, "bad_kind": true, "bad_member": true, "not_object": true}
	guestSays := map[string]members{"bye": {"reason": code}, "hello": {}}
	harnessSays := map[string]members{"end": {}}
	read(t, "conversations", func(t *testing.T, v vectors) {
		for _, c := range v.Conversations {
			for n, step := range c.Steps {
				payload := []byte{}
				if step.Made != nil {
					step.Made["message"] = ""
					payload, _ = json.Marshal(step.Made)
				} else if step.Payload != nil {
					payload = []byte(*step.Payload)
				} else {
					continue
				}
				besides := map[string]map[string]members{"guest": toGuest, "harness": toHarness}[step.To]
				if step.From != "" {
					besides = map[string]map[string]members{"guest": guestSays, "harness": harnessSays}[step.From]
				}
				wanted := Breach("")
				for _, after := range c.Steps[n+1:] {
					if step.From != "guest" || after.From != "" {
						break
					}
					if after.Made["code"] == "malformed" {
						wanted = "bad_member" // what the launcher answers [R4]
					}
					if after.End == "violation" && own[after.Code] {
						wanted = after.Code
					}
				}
				message, err := Parse(payload, 64)
				if err == nil && v.Dialect == "kenaz" && step.To == "" && n > 0 || v.Dialect == "kenaz" && step.To != "" {
					err = Check(message, besides)
				}
				// The launcher answers for a harness of the dialect harness-vm what is no message, and goes on; in a
				// hello it answers by `refused`. A kind may be wrong only for who says it.
				tolerated := v.Dialect == "harness-vm" && (step.From == "harness" || wanted == "bad_kind")
				if code_of(err) != wanted && !tolerated && !(n == 0 && step.From == "guest") {
					t.Errorf("%s, step %d: %v, not %q", c.Name, n, err, wanted)
				}
			}
		}
	})
}
