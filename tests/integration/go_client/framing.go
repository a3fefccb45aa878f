// A client of the channel's protocol in Go, written from docs/reference/vsock-protocol.md and from nothing else.
// The letters in brackets are that document's rules.
package main

import (
	"bytes"
	"encoding/binary"
)

// A Breach is a rule broken, by its code.
type Breach string

func (b Breach) Error() string { return string(b) }

// A Framing cuts a stream into payloads, and makes frames of payloads.
type Framing interface {
	// Feed returns the payloads that data completes. A breach counts after them.
	Feed(data []byte) ([][]byte, error)
	// End says what is wrong with a stream that ends here.
	End() error
	Encode(payload []byte) ([]byte, error)
}

// LengthPrefixed is rules F1 to F5.
type LengthPrefixed struct {
	Limit  int
	held   []byte
	breach error
}

func (f *LengthPrefixed) allowed(length uint64) error {
	if length == 0 {
		return Breach("frame_empty")
	}
	if length > uint64(f.Limit) {
		return Breach("frame_too_large")
	}
	return nil
}

func (f *LengthPrefixed) Feed(data []byte) (payloads [][]byte, err error) {
	if f.breach != nil {
		return nil, f.breach
	}
	f.held = append(f.held, data...)
	for len(f.held) >= 4 {
		length := binary.BigEndian.Uint32(f.held)
		if f.breach = f.allowed(uint64(length)); f.breach != nil {
			return payloads, f.breach
		}
		end := 4 + int(length)
		if len(f.held) < end {
			break
		}
		payloads = append(payloads, append([]byte{}, f.held[4:end]...))
		f.held = f.held[end:]
	}
	return payloads, nil
}

func (f *LengthPrefixed) End() error {
	if len(f.held) > 0 {
		return Breach("frame_cut")
	}
	return nil
}

func (f *LengthPrefixed) Encode(payload []byte) ([]byte, error) {
	if err := f.allowed(uint64(len(payload))); err != nil {
		return nil, err
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), payload...), nil
}

// Lines is rules L1 to L5.
type Lines struct {
	LimitIn, LimitOut int // newline included
	held              []byte
	breach            error
}

func (f *Lines) Feed(data []byte) (payloads [][]byte, err error) {
	if f.breach != nil {
		return nil, f.breach
	}
	f.held = append(f.held, data...)
	for {
		at := bytes.IndexByte(f.held, '\n')
		if at >= f.LimitIn || (at < 0 && len(f.held) >= f.LimitIn) {
			f.breach = Breach("frame_too_large")
			return payloads, f.breach
		}
		if at < 0 {
			return payloads, nil
		}
		line := bytes.TrimSuffix(f.held[:at], []byte("\r"))
		if len(line) > 0 {
			payloads = append(payloads, append([]byte{}, line...))
		}
		f.held = f.held[at+1:]
	}
}

func (f *Lines) End() error {
	if len(f.held) > 0 {
		return Breach("frame_cut")
	}
	return nil
}

func (f *Lines) Encode(payload []byte) ([]byte, error) {
	switch {
	case len(payload) == 0:
		return nil, Breach("frame_empty")
	case len(payload) >= f.LimitOut:
		return nil, Breach("frame_too_large")
	case bytes.IndexByte(payload, '\n') >= 0:
		return nil, Breach("frame_newline")
	}
	return append(append([]byte{}, payload...), '\n'), nil
}
