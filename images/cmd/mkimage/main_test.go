package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	out := []string{"-out", dir, "-keys", filepath.Join(dir, "keys")}
	for _, c := range []struct {
		args   string
		status int
		says   string // on standard output or error
	}{
		{"", 2, "mkimage host -org"},
		{"-h", 0, "Exit status"},
		{"help", 0, "Exit status"},
		{"host -h", 0, "Exit status"},
		{"host", 2, "-org FILE"},
		{"host -org absent.json", 1, "absent.json"},
		{"host -tamper firmware", 2, "cmdline kernel initramfs"},
		{"host -tamper kernel -from absent.efi", 1, "mkimage host"},
		{"host -org x -version 1\n2", 2, "version"},
		{"disk", 1, "mkimage host"},
		{"predict", 2, "predict takes one"},
		{"predict absent.efi", 1, "absent.efi"},
		{"keys extra", 2, "files given"},
		{"destroy", 2, "unknown command"},
		{"host -no-such-flag", 2, "no-such-flag"},
	} {
		args := strings.FieldsFunc(c.args, func(r rune) bool { return r == ' ' })
		if len(args) > 0 && args[0] != "-h" && args[0] != "help" {
			args = append(args, out...)
		}
		var stdout, stderr bytes.Buffer
		if got := run(t.Context(), args, &stdout, &stderr); got != c.status {
			t.Errorf("mkimage %s: exit status %d, want %d\n%s", c.args, got, c.status, &stderr)
		}
		if s := stdout.String() + stderr.String(); !strings.Contains(s, c.says) {
			t.Errorf("mkimage %s: does not say %q:\n%s", c.args, c.says, s)
		}
	}
}

func TestKeysAsJSON(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	var first, second, stderr bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		if status := run(t.Context(), []string{"keys", "-json", "-keys", dir}, b, &stderr); status != 0 {
			t.Fatalf("exit status %d\n%s", status, &stderr)
		}
	}
	var k keys
	if err := json.Unmarshal(first.Bytes(), &k); err != nil {
		t.Fatal(err)
	}
	if k.PK == k.DB || first.String() != second.String() {
		t.Errorf("keys changed or are equal:\n%s%s", &first, &second)
	}
}
