package main

import (
	"strings"
	"testing"
)

func TestAccelBeforeAndAfterTheCommand(t *testing.T) {
	for line, want := range map[string]string{
		"up":                           "auto: up",
		"up --accel tcg":               "tcg: up",
		"up -accel=kvm --json":         "kvm: up --json",
		"up --json --accel=tcg":        "tcg: up --json",
		"run -accel tcg":               "tcg: run",
		"exec work -- qemu -accel kvm": "auto: exec work -- qemu -accel kvm",
		"tamper kernel --accel":        "usage",
		"exec --accel -- true":         "usage",
	} {
		accel, rest, err := accelIn("auto", strings.Fields(line))
		got := accel + ": " + strings.Join(rest, " ")
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
	if accel, _, _ := accelIn("kvm", []string{"up"}); accel != "kvm" {
		t.Errorf("the flag before the command is lost: %s", accel)
	}
}
