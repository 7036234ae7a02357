package connectip

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	masque "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/yosida95/uritemplate/v3"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

// TestForeignServer: this client over HTTP/3 against connect-ip-go's server.
func TestForeignServer(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"gateway.test"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	config := cryptrec.Config()
	config.Certificates = []tls.Certificate{pair}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	conns := make(chan *masque.Conn, 1)
	server := &http3.Server{TLSConfig: http3.ConfigureTLSConfig(config), EnableDatagrams: true, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, err := masque.ParseProxyRequest(r, uritemplate.MustNew("https://gateway.test"+Path))
		if err != nil {
			t.Error(err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c, err := (&masque.Proxy{}).Proxy(w, req)
		if err != nil {
			t.Error(err)
			return
		}
		c.AssignAddresses([]netip.Prefix{netip.MustParsePrefix("10.80.0.2/32")})
		c.AdvertiseRoute([]masque.IPRoute{{StartIP: netip.MustParseAddr("0.0.0.0"), EndIP: netip.MustParseAddr("255.255.255.255")}})
		conns <- c
	})}
	go server.Serve(udp)
	defer server.Close()

	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	o, err := dialH3(ctx, tunnel.Target{
		Gateway: attest.Endpoint{Address: netip.MustParseAddrPort(udp.LocalAddr().String()), ServerName: "gateway.test"},
		Roots:   roots, Credential: &pair, Until: time.Now().Add(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.assignment.MTU != DefaultMTU || o.stream.Trains {
		t.Errorf("a foreign server's session: mtu %d, trains %v", o.assignment.MTU, o.stream.Trains)
	}
	assigned, received := make(chan []netip.Prefix, 4), make(chan []byte, 4)
	o.stream.Probe = true
	o.stream.OnAssign = func(p []netip.Prefix) error { assigned <- p; return nil }
	o.stream.OnPackets = func(p [][]byte) int {
		for _, b := range p {
			received <- bytes.Clone(b)
		}
		return 0
	}
	ran := make(chan struct{})
	go func() { o.stream.Run(ctx); close(ran) }()
	defer func() { cancel(); <-ran }()
	if p := <-assigned; len(p) != 1 || p[0].String() != "10.80.0.2/32" {
		t.Errorf("assigned %v", p)
	}
	c := <-conns
	out := make([]byte, 40)
	copy(out, []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0x66, 0x23, 10, 80, 0, 2, 10, 1, 0, 80})
	o.stream.Send(append(make(tunnel.Frame, tunnel.FrameHeader), out...))
	b := make([]byte, 2000)
	if n, err := c.ReadPacket(b); err != nil || !bytes.Equal(b[:n], out) {
		t.Errorf("the server received %x, %v", b[:n], err)
	}
	back := bytes.Clone(out)
	copy(back[12:], []byte{10, 1, 0, 80, 10, 80, 0, 2})
	if _, err := c.WritePacket(bytes.Clone(back)); err != nil {
		t.Error(err)
	}
	if got := <-received; !bytes.Equal(got[12:], back[12:]) {
		t.Errorf("received %x, want %x", got, back)
	}
	// A question for a sign of life reaches the application behind the server.
	o.stream.ask()
	req, err := c.ReceiveAddressRequest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_ = req
	c.AssignAddresses([]netip.Prefix{netip.MustParsePrefix("10.80.0.2/32")})
	if p := <-assigned; len(p) != 1 || p[0].String() != "10.80.0.2/32" {
		t.Errorf("answered %v", p)
	}
}
