package main

import (
	"bytes"
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Object is a message, or any object within one. Numbers are float64.
type Object = map[string]interface{}

var word = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// Parse reads a payload by rules J1 to J7.
func Parse(payload []byte, depth int) (message Object, err error) {
	if !utf8.Valid(payload) {
		return nil, Breach("bad_utf8")
	}
	defer func() {
		if breach, is := recover().(Breach); is {
			message, err = nil, breach
		}
	}()
	p := parser{rest: payload}
	value := p.value(depth)
	p.space()
	if len(p.rest) > 0 {
		panic(Breach("bad_json"))
	}
	message, is := value.(Object)
	if !is {
		return nil, Breach("not_object")
	}
	if kind, _ := message["kind"].(string); !word.MatchString(kind) {
		return nil, Breach("bad_kind")
	}
	return message, nil
}

// parser panics with a Breach.
type parser struct{ rest []byte }

func (p *parser) space() { p.rest = bytes.TrimLeft(p.rest, " \t\r\n") }

// next is the byte that comes after white space; 0 at the end.
func (p *parser) next() byte {
	p.space()
	if len(p.rest) == 0 {
		return 0
	}
	return p.rest[0]
}

func (p *parser) take(text string) bool {
	if !bytes.HasPrefix(p.rest, []byte(text)) {
		return false
	}
	p.rest = p.rest[len(text):]
	return true
}

func (p *parser) must(text string) {
	p.space()
	if !p.take(text) {
		panic(Breach("bad_json"))
	}
}

var number = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?`)

func (p *parser) value(depth int) interface{} {
	switch first := p.next(); {
	case first == '{' || first == '[':
		if depth == 0 {
			panic(Breach("too_deep")) // [J5]
		}
		if first == '{' {
			return p.object(depth - 1)
		}
		return p.array(depth - 1)
	case first == '"':
		return p.text()
	case p.take("true"):
		return true
	case p.take("false"):
		return false
	case p.take("null"):
		return nil
	case p.take("NaN"), p.take("Infinity"), p.take("-Infinity"):
		panic(Breach("bad_number")) // [J4]
	}
	found := string(number.Find(p.rest))
	if !p.take(found) || found == "" {
		panic(Breach("bad_json"))
	}
	float, _ := strconv.ParseFloat(found, 64)
	isInteger := !strings.ContainsAny(found, ".eE")
	if math.IsInf(float, 0) || isInteger && len(found) > 20 {
		panic(Breach("bad_number"))
	}
	return float
}

func (p *parser) object(depth int) Object {
	members := Object{}
	p.must("{")
	if p.next() == '}' {
		p.must("}")
		return members
	}
	for {
		p.space()
		key := p.text()
		if _, is := members[key]; is {
			panic(Breach("duplicate_key")) // [J3]
		}
		p.must(":")
		members[key] = p.value(depth)
		if p.next() != ',' {
			p.must("}")
			return members
		}
		p.must(",")
	}
}

func (p *parser) array(depth int) []interface{} {
	items := []interface{}{}
	p.must("[")
	if p.next() == ']' {
		p.must("]")
		return items
	}
	for {
		items = append(items, p.value(depth))
		if p.next() != ',' {
			p.must("]")
			return items
		}
		p.must(",")
	}
}

var escapes = map[byte]rune{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

func (p *parser) text() string {
	if !p.take(`"`) {
		panic(Breach("bad_json"))
	}
	var text strings.Builder
	for {
		if len(p.rest) == 0 || p.rest[0] < 0x20 {
			panic(Breach("bad_json"))
		}
		switch {
		case p.take(`"`):
			return text.String()
		case p.take(`\u`):
			text.WriteRune(p.escaped())
		case p.take(`\`):
			if len(p.rest) == 0 || escapes[p.rest[0]] == 0 {
				panic(Breach("bad_json"))
			}
			text.WriteRune(escapes[p.rest[0]])
			p.rest = p.rest[1:]
		default:
			text.WriteByte(p.rest[0])
			p.rest = p.rest[1:]
		}
	}
}

// escaped is what \uXXXX stands for; surrogates come in pairs [J6].
func (p *parser) escaped() rune {
	first := p.hex()
	if first < 0xD800 || first > 0xDFFF {
		return first
	}
	if first > 0xDBFF || !p.take(`\u`) {
		panic(Breach("bad_unicode"))
	}
	second := p.hex()
	if second < 0xDC00 || second > 0xDFFF {
		panic(Breach("bad_unicode"))
	}
	return 0x10000 + (first-0xD800)<<10 + second - 0xDC00
}

func (p *parser) hex() rune {
	if len(p.rest) < 4 {
		panic(Breach("bad_json"))
	}
	value, err := strconv.ParseUint(string(p.rest[:4]), 16, 32)
	if err != nil {
		panic(Breach("bad_json"))
	}
	p.rest = p.rest[4:]
	return rune(value)
}
