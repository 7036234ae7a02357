//go:build linux

package wpa

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBook(t *testing.T) {
	file := File(filepath.Join(t.TempDir(), "networks"))
	s := New(t.TempDir(), nil, slog.New(slog.DiscardHandler))
	city := Network{SSID: SSID("city"), Security: Enterprise, Server: "radius.city.example"}
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
	if got := names(b); got != "city hotel home" {
		t.Errorf("networks %q", got)
	}
	if n := b.list[1]; n.Passphrase.Reveal() != "battery staple" || n.Priority != 2 || !n.Hidden {
		t.Errorf("%+v, passphrase %q", n, n.Passphrase.Reveal())
	}
	if st, err := os.Stat(string(file)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
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
	if err := os.Chmod(string(file), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := OpenBook(file, s, nil); err == nil || len(b.list) != 0 {
		t.Error("a file that others can read was believed")
	}
}
