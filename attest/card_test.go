package attest

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestCardPermit(t *testing.T) {
	good := CardPermit{Serial: "s", User: "taro", Do: CardEnrol, Finger: "right-index-finger", Reason: "new", Expires: time.Unix(3600, 0)}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*CardPermit){
		"no serial": func(p *CardPermit) { p.Serial = "" }, "no user": func(p *CardPermit) { p.User = "" },
		"no reason": func(p *CardPermit) { p.Reason = "" }, "no action": func(p *CardPermit) { p.Do = "" },
		"no finger": func(p *CardPermit) { p.Finger = "" }, "no PIN": func(p *CardPermit) { p.Do = CardPIN },
		"no certificate": func(p *CardPermit) { p.Do = CardImport }, "two days": func(p *CardPermit) { p.Do, p.Minutes = CardPINOnly, 2*24*60 },
		"a long name": func(p *CardPermit) { p.Name = strings.Repeat("x", 200) },
	} {
		p := good
		change(&p)
		if err := p.Validate(); err == nil {
			t.Errorf("%s: valid", name)
		}
	}
	for name, c := range map[string]struct {
		device Digest
		now    int64
		ok     bool
	}{"in force": {Digest{}, 0, true}, "another device": {Digest{1}, 0, false}, "expired": {Digest{}, 3600, false}, "for long": {Digest{}, 3600 - 8*86400, false}} {
		if err := good.InForce(c.device, time.Unix(c.now, 0)); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCardPIN(t *testing.T) {
	for pin, ok := range map[string]bool{"123456": true, "12345678": true, "12345": false, "123456789": false, "12345a": false, "": false} {
		if padded, err := PadCardPIN(pin); (err == nil) != ok || ok && !bytes.Equal(padded, []byte((pin + "\xff\xff\xff\xff")[:8])) {
			t.Errorf("%q: %x, %v", pin, padded, err)
		}
	}
}

func FuzzCard(f *testing.F) {
	f.Add([]byte(`{"serial":"s","device_id":"` + strings.Repeat("0", 64) + `","user":"u","do":"unblock","reason":"r","expires":"2026-11-22T00:00:00Z"}`))
	f.Add([]byte(`{"device_id":"` + strings.Repeat("0", 64) + `","events":[{"number":1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := ParseCardPermit(data); err == nil && p.Do == "" {
			t.Errorf("%q is a permit for nothing", data)
		}
		if n, err := ParseLogonNews(data); err == nil && len(n.Events) > maxLogonEvents {
			t.Errorf("%d events", len(n.Events))
		}
	})
}
