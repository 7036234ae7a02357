//go:build linux

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"crypto/x509/pkix"
	"math/big"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/gateway"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/kernel"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

const benchBytes = 256 << 20 // of each transfer

// BenchmarkTunnel sends one TCP stream through the connectip tunnel, over plain
// TLS of the same algorithms, and over the bare veth pair below both, in turns
// within one run: quote the ratios, for the absolute figures are the machine's.
// Both ends share this process and its cores.
func BenchmarkTunnel(b *testing.B) {
	nstest.Require(b)
	client, site := nstest.New(b, "client"), nstest.New(b, "site")
	nstest.Pair(client, "eth0", "203.0.113.1/24", site, "eth0", "203.0.113.20/24")
	openTunnel(b, client, site)

	paths := []struct{ name, address string }{{"veth", "203.0.113.20:5001"}, {"tls", "203.0.113.20:5002"}, {"tunnel", "10.80.0.1:5003"}}
	serverTLS, clientTLS := plainTLS(b)
	for _, p := range paths {
		l := site.Listen(p.address)
		if p.name == "tls" {
			l = tls.NewListener(l, serverTLS)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(io.Discard, struct{ io.Reader }{c})
				c.Close()
			}
		}()
	}
	spent := map[string]time.Duration{}
	b.SetBytes(int64(len(paths) * benchBytes))
	for b.Loop() {
		for _, p := range paths {
			start := time.Now()
			if err := transfer(client, p.address, map[bool]*tls.Config{true: clientTLS}[p.name == "tls"]); err != nil {
				b.Fatal(p.name, err)
			}
			spent[p.name] += time.Since(start)
		}
	}
	for _, p := range paths {
		b.ReportMetric(float64(b.N)*benchBytes*8/1e9/spent[p.name].Seconds(), p.name+"-Gbit/s")
	}
	b.ReportMetric(spent["tls"].Seconds()/spent["tunnel"].Seconds(), "tunnel/tls")
	b.ReportMetric(spent["veth"].Seconds()/spent["tunnel"].Seconds(), "tunnel/veth")
}

// transfer sends benchBytes and waits until the far end has read them.
func transfer(from *nstest.NS, address string, config *tls.Config) error {
	var c net.Conn
	if err := from.Do(func() (err error) { c, err = net.DialTimeout("tcp", address, 5*time.Second); return err }); err != nil {
		return err
	}
	defer c.Close()
	var out interface {
		io.Writer
		CloseWrite() error
	} = c.(*net.TCPConn)
	if config != nil {
		t := tls.Client(c, config)
		c, out = t, t
	}
	chunk := make([]byte, 256<<10)
	for range benchBytes / len(chunk) {
		if _, err := out.Write(chunk); err != nil {
			return err
		}
	}
	if err := out.CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, struct{ io.Reader }{c})
	return err
}

// openTunnel runs a gateway in site and a driver in client, the inner address
// 10.80.0.2 on the client's tun0 and the gateway's own, 10.80.0.1, at the far end.
func openTunnel(b *testing.B, client, site *nstest.NS) {
	ca, verifier := newAuthority(b, "City CA"), newAuthority(b, "Verifier CA")
	chain, key := ca.server(b, "gateway.test")
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		b.Fatal(err)
	}
	server := cryptrec.Config()
	server.Certificates, server.ClientAuth, server.ClientCAs = []tls.Certificate{pair}, tls.RequireAndVerifyClientCert, pool(verifier.cert)
	server.NextProtos, server.DynamicRecordSizingDisabled = []string{"http/1.1"}, true
	config := &gateway.Config{Pool: netip.MustParsePrefix("10.80.0.0/16"), MTU: connectip.DefaultMTU, MaxSessions: 10}
	leases, err := gateway.OpenLeases(b.TempDir()+"/leases.json", config.Pool)
	if err != nil {
		b.Fatal(err)
	}
	far := device(b, site, plan.Namespace{
		Links:     []plan.Link{{Name: "tun0", Up: true, MTU: config.MTU}},
		Addresses: []plan.Address{{Link: "tun0", Prefix: netip.MustParsePrefix("10.80.0.1/32")}},
		Routes:    []plan.Route{{Destination: config.Pool, Link: "tun0"}},
		Ruleset:   plan.Ruleset{Table: "bench"},
	})
	near := device(b, client, plan.Namespace{
		Links:     []plan.Link{{Name: "tun0", Up: true, MTU: config.MTU}},
		Addresses: []plan.Address{{Link: "tun0", Prefix: netip.MustParsePrefix("10.80.0.2/32")}},
		Routes:    []plan.Route{{Destination: config.Pool, Link: "tun0"}},
		Ruleset:   plan.Ruleset{Table: "bench"},
	})
	ctx, cancel := context.WithCancel(context.Background())
	l := site.Listen("203.0.113.20:443")
	driver := connectip.New(near)
	ended := make(chan struct{}, 2)
	go func() {
		gateway.New(config, server, leases, far, slog.New(slog.DiscardHandler)).Serve(ctx, l)
		ended <- struct{}{}
	}()
	go func() { driver.Run(ctx); ended <- struct{}{} }()
	b.Cleanup(func() { cancel(); <-ended; <-ended })

	k := newKey(b)
	cert := issue(b, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "laptop"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "urn", Opaque: "sekisho:device:" + strings.Repeat("ab", 32)}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, verifier.cert, k.Public(), verifier.key)
	if err := client.Do(func() error {
		_, err := driver.Up(ctx, tunnel.Target{
			Gateway: attest.Endpoint{Address: netip.MustParseAddrPort("203.0.113.20:443"), ServerName: "gateway.test"}, Roots: pool(ca.cert),
			Credential: &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: k}, Until: cert.NotAfter,
		})
		return err
	}); err != nil {
		b.Fatal(err)
	}
}

// device makes tun0 in ns as want says.
func device(b *testing.B, ns *nstest.NS, want plan.Namespace) *tunnel.Device {
	n, err := kernel.Open(ns.Path)
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	dev, err := n.CreateTUN("tun0", connectip.DefaultMTU)
	if err != nil {
		b.Fatal(err)
	}
	if err := n.Apply(want); err != nil {
		b.Fatal(err)
	}
	return tunnel.NewDevice(dev)
}

func plainTLS(b *testing.B) (server, client *tls.Config) {
	ca := newAuthority(b, "City CA")
	chain, key := ca.server(b, "plain.test")
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		b.Fatal(err)
	}
	server, client = cryptrec.Config(), cryptrec.Config()
	server.Certificates = []tls.Certificate{pair}
	client.RootCAs, client.ServerName, client.DynamicRecordSizingDisabled = pool(ca.cert), "plain.test", true
	return server, client
}

func pool(c *x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c)
	return p
}
