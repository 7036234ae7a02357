package lab

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sekisho/images/lab/hook"
	"sekisho/netd"
)

// TestPlaces is one boot of a laptop whose clock says 1970, and takes it from
// home to the office, home, and to a hotel.
func TestPlaces(t *testing.T) {
	b := realLab(t)
	// Without the right time no certificate is good, so the page proves that
	// the clock was set.
	if _, err := b.Up(t.Context(), Boot{Clock: "1970-01-02T00:00:00"}); err != nil {
		t.Fatal(err)
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
		must(t, b.Surround(t.Context(), "home"))
		b.netd(t, "Tunnel")
	})
	b.scenario(t, "hotel with a sign-in page", func(t *testing.T) {
		must(t, b.Surround(t.Context(), "hotel"))
		if s := b.netd(t, "Portal"); s.Words.EN != "Sign in to this network" {
			t.Errorf("words %+v", s.Words)
		}
		b.noPage(t)
		must(t, b.Surround(t.Context(), "home"))
		b.netd(t, "Tunnel")
	})
	for _, name := range []string{"udp-blocked", "mtu-1280"} {
		b.scenario(t, name, func(t *testing.T) {
			must(t, b.Surround(t.Context(), name))
			b.netd(t, "Tunnel")
		})
	}
}

// netd waits until netd is in a state and returns its status.
func (b *bench) netd(t *testing.T, state string) (s netd.Status) {
	t.Helper()
	if err := json.Unmarshal(b.untilState(t, "netd", state, "").Body, &s); err != nil {
		t.Fatal(err)
	}
	return s
}
