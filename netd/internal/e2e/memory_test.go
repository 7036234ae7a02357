//go:build linux

package e2e

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"sekisho/attest/cryptrec"
	"sekisho/netd/internal/nstest"
)

// BenchmarkGatewayMemory is what an idle session over TLS costs the gateway:
// the growth of its process from 100 sessions to 500, of as many devices.
func BenchmarkGatewayMemory(b *testing.B) {
	nstest.Require(b)
	const few, many = 100, 500
	for b.Loop() {
		far := nstest.New(b, "far")
		p := newPaper(b)
		g := newGateway(b, p, far, roleConfig{Tun: "tun0", Listen: "127.0.0.1:443"})
		roots := x509.NewCertPool()
		roots.AddCert(p.ca.cert)
		var conns []io.Closer
		open := func(n int) {
			if err := far.Do(func() error {
				for len(conns) < n {
					c, err := idleSession(b, p, roots, fmt.Sprintf("%064x", len(conns)+1))
					if err != nil {
						return fmt.Errorf("session %d: %w", len(conns), err)
					}
					conns = append(conns, c)
				}
				return nil
			}); err != nil {
				b.Fatal(err)
			}
		}
		open(few)
		before := g.resident()
		open(many)
		after := g.resident()
		each := float64(after-before) / (many - few)
		b.ReportMetric(each, "KiB/session")
		fmt.Printf("an idle session costs the gateway %.1f KiB, target at most 40\n", each)
		b.ReportMetric(float64(after)/1024, "MiB-with-500")
		for _, c := range conns {
			c.Close()
		}
		g.stop()
	}
}

// idleSession opens a session by hand and leaves it alone.
func idleSession(b *testing.B, p paper, roots *x509.CertPool, device string) (io.Closer, error) {
	chain, key := p.device(b, device, time.Hour)
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	if err != nil {
		return nil, err
	}
	config := cryptrec.Config()
	config.RootCAs, config.ServerName, config.Certificates = roots, "gateway.test", []tls.Certificate{pair}
	c, err := tls.Dial("tcp", "127.0.0.1:443", config)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, "GET /.well-known/masque/ip/*/*/ HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: connect-ip\r\nCapsule-Protocol: ?1\r\n\r\n"); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("http status %d", resp.StatusCode)
	}
	return c, err
}

// resident is what the role has resident now, in KiB (proc_pid_status(5)).
func (r *role) resident() int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.cmd.Process.Pid))
	if err != nil {
		r.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		r.t.Fatal(err)
	}
	return kib
}
