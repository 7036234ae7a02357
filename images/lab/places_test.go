package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/images/lab/hook"
	"sekisho/netd"
)

// TestPlaces is one boot of a laptop whose clock says 1970, and takes it from
// home to the office, home, and to a hotel. Its guest link is the virtio-serial
// port.
func TestPlaces(t *testing.T) {
	b := realLab(t, func(l *Lab) { l.Link = attest.LinkSerial })
	// Without the right time no certificate is good, so the page proves that
	// the clock was set.
	if _, err := b.Up(t.Context(), Boot{Clock: "1970-01-02T00:00:00"}); err != nil {
		t.Fatal(err)
	}
	var l struct {
		Transport string `json:"transport"`
	}
	must(t, json.Unmarshal(b.untilState(t, "linkd", "linked", "").Body, &l))
	if l.Transport != "serial" {
		t.Errorf("the guest link runs over %q, want serial", l.Transport)
	}
	a, err := b.Exec(t.Context(), hook.Host, "/bbin/netd", "journal")
	must(t, err)
	// The clock chip keeps two digits of the year: 70 is read as 2070.
	if !regexp.MustCompile(`clock was (19|20)70-01-02T`).Match(a.Stdout) {
		t.Errorf("the journal does not tell that the clock was set:\n%s", a.Stdout)
	}
	b.scenario(t, "office and back", func(t *testing.T) {
		must(t, b.Surround(t.Context(), "office"))
		s := b.netd(t, "Office")
		lan := s.Uplink.Address.Addr()
		if !officePrefix.Contains(lan) {
			t.Errorf("in the office at %s", lan)
		}
		// Out: the office's server sees the laptop's address in the LAN.
		b.until(t, "the office's server", func(ctx context.Context) bool {
			a, err := b.Exec(ctx, hook.Work, "fetch", "-timeout", "3s", "http://"+AssetsAddress+"/")
			return err == nil && a.Exit == 0 && strings.HasPrefix(string(a.Stdout), assetsText+lan.String()+":")
		})
		// In: nothing listens there in the stand-in, and it says so.
		call := func() error {
			return inNamespace("sekisho-home", func() error {
				c, err := net.DialTimeout("tcp", net.JoinHostPort(lan.String(), "5985"), 5*time.Second)
				if err == nil {
					c.Close()
				}
				return err
			})
		}
		b.until(t, "the work domain to refuse a connection", func(context.Context) bool { return errors.Is(call(), syscall.ECONNREFUSED) })
		b.untilPage(t) // LGWAN through the tunnel
		b.killAll(t)
		b.netd(t, "Office")
		must(t, b.Surround(t.Context(), "home"))
		b.netd(t, "Tunnel")
	})
	b.scenario(t, "hotel with a sign-in page", func(t *testing.T) {
		must(t, b.Surround(t.Context(), "hotel"))
		if s := b.netd(t, "Portal"); s.Words.EN != "Sign in to this network" {
			t.Errorf("words %+v", s.Words)
		}
		b.killAll(t)
		b.netd(t, "Portal")
		b.noPage(t)
		must(t, b.Surround(t.Context(), "home"))
		b.netd(t, "Tunnel")
	})
	b.scenario(t, "no network but a card without driver", func(t *testing.T) {
		must(t, b.Uplink(t.Context(), "wired", false))
		b.netd(t, "Dark")
		b.killAll(t)
		// What can be seen of a card that the kernel has no driver for is said.
		b.until(t, "the card to be named", func(ctx context.Context) bool {
			s, err := b.network(ctx)
			return err == nil && s.State == netd.Dark && len(s.Unserved) == 1 && s.Unserved[0].ID == "10ec:8029" && strings.Contains(s.Detail, s.Unserved[0].String())
		})
		must(t, b.Uplink(t.Context(), "wired", true))
		b.netd(t, "Tunnel")
	})
	for _, name := range []string{"udp-blocked", "mtu-1280"} {
		b.scenario(t, name, func(t *testing.T) {
			must(t, b.Surround(t.Context(), name))
			b.netd(t, "Tunnel")
		})
	}
	b.scenario(t, "vsock ports, none of which is published here", func(t *testing.T) {
		a, err := b.Call(t.Context(), hook.Request{Target: hook.Work, Timeout: time.Minute, Argv: []string{"labguest", "ports", "-for", "15s"}})
		must(t, err)
		count, answered, _ := strings.Cut(strings.TrimSpace(string(a.Stdout)), " answered")
		tried, err := strconv.Atoi(strings.TrimPrefix(count, "tried "))
		if err != nil || tried < 100 || answered != "" {
			t.Errorf("%q %q, %v", a.Stdout, a.Stderr, err)
		}
		t.Logf("%s", bytes.TrimSpace(a.Stdout))
	})
	t.Run("asleep at home, awake in the office", b.suspended)
	// Last: the work domain is asked to switch itself off, and with it goes the
	// laptop.
	t.Run("shutdown by the link", func(t *testing.T) {
		a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Timeout: 30 * time.Second, Socket: "/run/sekisho/linkd.sock",
			Method: http.MethodPost, Path: "/v1/power", Stdin: []byte(`{"action":"shutdown"}`)})
		must(t, err)
		if a.Exit != http.StatusAccepted {
			t.Fatalf("http status %d: %s", a.Exit, a.Stdout)
		}
		qemu, err := b.find("qemu")
		must(t, err)
		b.until(t, "the laptop to be off", func(ctx context.Context) bool {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return qemu.wait(ctx) == nil
		})
		if s := b.console(t); !strings.Contains(s, "init: power off") {
			t.Error("the laptop did not go off by itself: the console does not say so")
		}
	})
}

// suspended suspends the laptop to RAM (ACPI S3), moves its cable to the office
// while it sleeps, and wakes it. The clock chip goes on meanwhile.
func (b *bench) suspended(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() {
			b.evidence(context.WithoutCancel(t.Context()), t)
		}
	})
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Detach: true, Argv: []string{"/bbin/gosh", "-c", "echo mem > /sys/power/state"}})
	if err != nil || a.Error != "" {
		t.Fatalf("suspend: %v %s", err, a.Error)
	}
	b.until(t, "the laptop to sleep", func(ctx context.Context) bool {
		s, err := qmp(ctx, "query-status", nil)
		return err == nil && bytes.Contains(s, []byte("suspended"))
	})
	must(t, b.Surround(t.Context(), "office"))
	begin := time.Now()
	_, err = qmp(t.Context(), "system_wakeup", nil)
	must(t, err)
	b.netd(t, "Office")
	t.Logf("Office seen %.1f s after the wake-up", time.Since(begin).Seconds())
	must(t, b.Surround(t.Context(), "home"))
	b.netd(t, "Tunnel")
	b.cleanUplink(t, true)
}

// netd waits until netd is in a state and returns its status.
func (b *bench) netd(t *testing.T, state string) (s netd.Status) {
	t.Helper()
	if err := json.Unmarshal(b.untilState(t, "netd", state, "").Body, &s); err != nil {
		t.Fatal(err)
	}
	return s
}
