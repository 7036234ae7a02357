//go:build linux

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// TestRogueOffices takes the laptop into LANs that look like the office: the
// same addresses, the same router's and server's hardware addresses, the same
// DNS domain. Each has something in the beacon's place. The work domain calls
// the office's server all the time, and not one of its packets may be seen.
func TestRogueOffices(t *testing.T) {
	var all sync.WaitGroup
	defer all.Wait()
	places := make(chan struct{}, together)
	for name, rogue := range map[string]func(w *world, genuine, fake *desk){
		"nobody": func(*world, *desk, *desk) {},
		// Its certificate says everything that the true one says.
		"self-signed beacon": func(w *world, _, f *desk) { f.startBeacon(newAuthority(w.t, "Office CA")) },
		// The organisation's servers have certificates too, of another authority.
		"certificate of the organisation's other CA": func(w *world, _, f *desk) { f.startBeacon(w.ca) },
		"true beacon relayed":                        func(w *world, tr, f *desk) { w.relay(tr, f, relay{ttl: 255}) },
		"true beacon relayed, nothing set right": func(w *world, tr, f *desk) {
			w.relay(tr, f, relay{ttl: 64})
		},
		"true beacon relayed from a twin of the laptop, 60 ms away": func(w *world, tr, f *desk) {
			w.relay(tr, f, relay{ttl: 255, twin: true, delay: 30 * time.Millisecond})
		},
	} {
		play := func(t *testing.T) {
			w := newWorld(t)
			d := w.newDesk()
			d.startBeacon(d.officeCA)
			f := w.lookalike("rogue")
			rogue(w, d, f)
			w.startGateway()
			w.attestd.set(gate.StateAffirming, time.Hour)
			w.startNetd()
			w.waitState(30*time.Second, netd.Tunnel, "")
			w.readPage(10 * time.Second)
			go serveSecrets(f.servers.Listen(assetsAddr))
			stop := w.pester()
			w.plug(w.home, f.router)
			s := w.waitAddress("10.20.0.")
			// Long enough for a dozen attempts of the first, quick kind.
			deadline := time.Now().Add(6 * time.Second)
			for time.Now().Before(deadline) {
				if s, _ = w.status(); s.State == netd.Office || s.Office != nil {
					t.Fatalf("taken for the office: %+v", s)
				}
				if c, err := call(w.work, assetsAddr, 200*time.Millisecond); err == nil {
					c.c.Close()
					t.Fatal("the work domain reached a server of the LAN")
				}
			}
			stop()
			w.judge()
			// The true office is one all the same.
			w.plug(f.router, d.router)
			w.waitState(60*time.Second, netd.Office, "")
		}
		all.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			t.Run(name, play)
		})
	}
}

// waitAddress waits until the uplink has an address that begins so.
func (w *world) waitAddress(prefix string) (s netd.Status) {
	w.t.Helper()
	nstest.Eventually(w.t, 20*time.Second, func() (err error) {
		if s, err = w.status(); err == nil && !strings.HasPrefix(s.Uplink.Address.String(), prefix) {
			err = fmt.Errorf("uplink %+v", s.Uplink)
		}
		return err
	})
	return s
}

func serveSecrets(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

// relay passes bytes between a rogue LAN and the true beacon.
type relay struct {
	ttl   int           // of its packets towards the laptop
	twin  bool          // in the true LAN it has the laptop's addresses and port
	delay time.Duration // of each direction
}

// relay starts one: a mole in the true LAN holds its other end.
func (w *world) relay(from, to *desk, r relay) {
	mole := nstest.New(w.t, "mole")
	from.router.Run("ip", "link", "add", "mole0", "type", "veth", "peer", "name", "eth0", "netns", mole.Path)
	from.router.Run("ip", "link", "set", "mole0", "up", "master", "br0")
	if r.twin {
		mole.Run("ip", "link", "set", "eth0", "address", net.HardwareAddr(w.hardware).String())
	} else {
		mole.Run("ip", "address", "add", "10.20.0.66/24", "dev", "eth0")
	}
	mole.Run("ip", "link", "set", "eth0", "up")
	ttl := func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, r.ttl) })
		return err
	}
	var l net.Listener
	if err := to.servers.Do(func() (err error) {
		l, err = (&net.ListenConfig{Control: ttl}).Listen(context.Background(), "tcp4", beaconAddr)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			dialer := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) (err error) {
				c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 255) })
				return err
			}}
			if laptop := near.RemoteAddr().(*net.TCPAddr); r.twin {
				mole.Try("ip", "address", "add", laptop.IP.String()+"/24", "dev", "eth0")
				dialer.LocalAddr = laptop
			}
			var far net.Conn
			if err := mole.Do(func() (err error) { far, err = dialer.Dial("tcp4", beaconAddr); return err }); err != nil {
				near.Close()
				continue
			}
			go r.pass(near, far)
			go r.pass(far, near)
		}
	}()
}

// pass copies one direction.
func (r relay) pass(from, to net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if r.delay > 0 {
			<-time.After(r.delay)
		}
		if _, err := to.Write(buf[:n]); err != nil && err != io.EOF {
			return
		}
	}
}
