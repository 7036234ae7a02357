//go:build linux

package e2e

import (
	"strings"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
)

// tunnelVision is what TunnelVision's DHCP server adds (CVE-2024-3661), and
// other options that must not be obeyed.
func tunnelVision() []string {
	return []string{
		"--dhcp-option-force=121,0.0.0.0/1,192.168.50.1,128.0.0.0/1,192.168.50.1,10.1.0.80/32,192.168.50.1",
		"--dhcp-option-force=249,0.0.0.0/1,192.168.50.1", "--dhcp-option-force=252,http://192.168.50.1/wpad.dat",
		"--dhcp-option-force=114,http://192.168.50.1/portal", "--dhcp-option-force=6,192.168.50.1",
	}
}

func TestPageThroughTheTunnel(t *testing.T) {
	w := newWorld(t, tunnelVision()...)
	w.startGateway()
	w.startNetd()
	w.waitState(20*time.Second, netd.Attesting, netd.ReasonAttestation)
	if _, err := w.fetch(page, time.Second); err == nil {
		t.Error("page read without a credential")
	}
	w.attestd.set(gate.StateAffirming, time.Hour)
	s := w.waitState(20*time.Second, netd.Tunnel, "")
	if s.Line() != "Tunnel inner 10.80.0.2 gateway 203.0.113.20:443" {
		t.Errorf("status line %q", s.Line())
	}
	w.readPage(10 * time.Second)
	if r := w.laptop.Run("ip", "route", "show", "table", "all"); contains(r, "default") || contains(r, "0.0.0.0/1") || contains(r, "10.1.0.80") {
		t.Errorf("routes outside obey the DHCP server:\n%s", r)
	}
	w.checkUplink()
}

func contains(s, sub string) bool { return strings.Contains(s, sub) }
