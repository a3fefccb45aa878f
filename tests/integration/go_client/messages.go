package main

import "regexp"

// The members of each kind [M, H, X, E, S], as far as a client of the dialect kenaz meets them.
type shape func(value interface{}) bool

func pattern(text string) shape {
	compiled := regexp.MustCompile(`^(?:` + text + `)$`)
	return func(value interface{}) bool {
		found, is := value.(string)
		return is && compiled.MatchString(found)
	}
}

func isObject(value interface{}) bool { _, is := value.(Object); return is }
func isText(value interface{}) bool   { _, is := value.(string); return is }
func isNumber(value interface{}) bool { _, is := value.(float64); return is }
func isList(value interface{}) bool   { _, is := value.([]interface{}); return is }
func isAny(interface{}) bool          { return true }

var (
	id   = pattern(`[A-Za-z0-9._:-]{1,128}`)
	tool = pattern(`[A-Za-z0-9._:/-]{1,128}`)
	code = pattern(`[a-z0-9][a-z0-9._-]{0,63}`)
)

type members map[string]shape

var passing = map[string]members{
	"tool.invoke":   {"id": id, "tool": tool, "arguments": isObject},
	"tool.cancel":   {"id": id},
	"tool.result":   {"id": id, "result": isAny},
	"tool.error":    {"id": id, "code": code, "message": isText},
	"prompt":        {"id": id, "text": isText},
	"prompt.delta":  {"id": id, "text": isText},
	"prompt.result": {"id": id, "text": isText},
	"prompt.error":  {"id": id, "code": code, "message": isText},
	"ping":          {"nonce": id},
	"pong":          {"nonce": id},
	"error":         {"code": code, "message": isText},
}

// What the launcher says to a guest, and to a harness, besides.
var toGuest = map[string]members{
	"welcome": {"protocol": isNumber, "session": isText, "capabilities": isList, "limits": isObject, "tools": isObject},
	"refused": {"code": code, "message": isText},
	"drain":   {"deadline": isNumber},
	"bye":     {"reason": code},
}

var toHarness = map[string]members{
	"session.open":  {"protocol": isNumber, "session": isText, "build": isText, "capabilities": isList},
	"session.close": {"outcome": isText},
	"guest.lost":    {},
	"guest.back":    {"build": isText, "capabilities": isList},
}

// Check looks at the members of a message that is passing, or of those kinds besides.
func Check(message Object, besides map[string]members) error {
	kind, _ := message["kind"].(string)
	if len(kind) > 1 && kind[:2] == "x-" {
		return nil // [M3]
	}
	wanted, is := passing[kind]
	if !is {
		wanted, is = besides[kind]
	}
	if !is {
		return Breach("bad_kind")
	}
	for name, fits := range wanted {
		value, is := message[name]
		if !is || !fits(value) {
			return Breach("bad_member")
		}
	}
	return nil
}
