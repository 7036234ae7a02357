//go:build linux

package wpa

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestBook(t *testing.T) {
	file := &memory{}
	s := New(t.TempDir(), slog.New(slog.DiscardHandler))
	city := Network{SSID: SSID("city"), Security: Enterprise, Server: "radius.city.example", Priority: 100}
	open := func() *Book {
		t.Helper()
		b, err := OpenBook(file, s, []Network{city})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	names := func(b *Book) string {
		list, err := b.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range list {
			out = append(out, e.Name)
		}
		return strings.Join(out, " ")
	}
	b := open()
	for _, n := range []Network{
		{SSID: SSID("home"), Security: Personal, Passphrase: "correct horse"},
		{SSID: SSID("hotel"), Security: Open},
		{SSID: SSID("home"), Security: Personal, Passphrase: "battery staple", Hidden: true},
	} {
		if err := b.Join(n); err != nil {
			t.Fatal(err)
		}
	}
	b = open() // as after a restart
	if got := names(b); got != "city home hotel" {
		t.Errorf("networks %q", got)
	}
	if n := b.list[1]; n.Passphrase.Reveal() != "battery staple" || n.Priority != 2 || !n.Hidden {
		t.Errorf("%+v, passphrase %q", n, n.Passphrase.Reveal())
	}
	if err := b.Forget(SSID("hotel")); err != nil {
		t.Error(err)
	}
	if err := b.Forget(SSID("city")); !errors.Is(err, ErrUnknown) {
		t.Errorf("the organisation's network was forgotten: %v", err)
	}
	if err := b.Join(Network{SSID: SSID("bad"), Security: Personal, Passphrase: "short"}); err == nil {
		t.Error("a passphrase that cannot be one was saved")
	}
	if got := names(open()); got != "city home" {
		t.Errorf("networks %q", got)
	}
	b = open()
	for _, n := range []string{"a", "b", "c"} {
		if err := b.Join(Network{SSID: SSID(n), Security: Open}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Prefer(SSID("a")); err != nil {
		t.Error(err)
	}
	if got := names(b); got != "city a c b home" {
		t.Errorf("after prefer: %q", got)
	}
	if err := b.Prefer(SSID("unheard of")); !errors.Is(err, ErrUnknown) {
		t.Errorf("preferred: %v", err)
	}
	file.full = true
	if err := b.Forget(SSID("a")); err == nil || names(b) != "city a c b home" {
		t.Errorf("what could not be saved was forgotten: %v", err)
	}
}

// TestAdopt: networks of earlier boots come behind those of this one, in their
// order, and never in place of one that was joined again.
func TestAdopt(t *testing.T) {
	file := &memory{}
	b, err := OpenBook(file, New(t.TempDir(), slog.New(slog.DiscardHandler)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Join(Network{SSID: SSID("home"), Security: Personal, Passphrase: "the new one"}); err != nil {
		t.Fatal(err)
	}
	if err := b.Adopt([]Network{{SSID: SSID("office"), Security: Open, Priority: 9}, {SSID: SSID("hotel"), Security: Open, Priority: 2}, {SSID: SSID("home"), Security: Personal, Passphrase: "the old one", Priority: 50}}); err != nil {
		t.Fatal(err)
	}
	list, err := Decode(file.data)
	if err != nil {
		t.Fatal(err)
	}
	var got string
	for _, n := range list {
		got += fmt.Sprintf("%s %s %d;", n.SSID, n.Passphrase.Reveal(), n.Priority)
	}
	if want := "hotel  1;office  2;home the new one 3;"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	many := make([]Network, maxSaved+1)
	for i := range many {
		many[i] = Network{SSID: SSID(fmt.Sprint(i)), Security: Open, Priority: i}
	}
	if u := Union(many, list); len(u) != maxSaved || string(u[maxSaved-1].SSID) != "home" || string(u[0].SSID) == "0" {
		t.Errorf("%d networks, first %s, last %s", len(u), u[0].SSID, u[len(u)-1].SSID)
	}
}

// memory is a Store.
type memory struct {
	data []byte
	full bool
}

func (m *memory) Load() ([]byte, error) { return m.data, nil }

func (m *memory) Save(b []byte) error {
	if m.full {
		return errors.New("full")
	}
	m.data = b
	return nil
}
