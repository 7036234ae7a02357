package connectip

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

// TestLesserKeyAgreementIsLeft: the laptop's check after the handshake, over
// both carriages, where the handshake itself let a lesser one pass.
func TestLesserKeyAgreementIsLeft(t *testing.T) {
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
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, CurvePreferences: []tls.CurveID{tls.CurveP256, tls.SecP256r1MLKEM768}}
	to := tunnel.Target{Gateway: attest.Endpoint{ServerName: "gateway.test"}, Roots: roots, Credential: &pair, Until: time.Now().Add(time.Hour)}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	asked := make(chan string, 10) // any request that came behind the handshake
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if line, err := bufio.NewReader(c).ReadString('\n'); err == nil {
					asked <- line
				}
			}()
		}
	}()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	h3 := &http3.Server{TLSConfig: http3.ConfigureTLSConfig(server), EnableDatagrams: true, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.Method })}
	go h3.Serve(udp)
	defer h3.Close()

	for _, c := range []struct {
		by    tls.CurveID
		least cryptrec.KeyAgreement
	}{{tls.CurveP256, cryptrec.P256MLKEM768}, {tls.SecP256r1MLKEM768, cryptrec.P384MLKEM1024}} {
		to.Agreement = c.least
		config := clientTLS(to)
		config.CurvePreferences = []tls.CurveID{c.by}

		to.Gateway.Address = netip.MustParseAddrPort(l.Addr().String())
		tcp, err := tunnel.DialTCP(ctx, to.Path, to.Gateway.Address, to.Proxy)
		if err != nil {
			t.Fatal(err)
		}
		wire, err := NewWire(tcp)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := upgrade(ctx, tls.Client(wire, config), wire, to); !errors.Is(err, cryptrec.ErrNotListed) {
			t.Errorf("TLS, agreed by %s where %s is the least: %v", c.by, c.least, err)
		}
		tcp.Close()

		config.NextProtos = []string{http3.NextProtoH3}
		conn, err := quic.DialAddr(ctx, udp.LocalAddr().String(), config, QUICConfig())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := connect(ctx, conn, func() {}, to); !errors.Is(err, cryptrec.ErrNotListed) {
			t.Errorf("HTTP/3, agreed by %s where %s is the least: %v", c.by, c.least, err)
		}
		conn.CloseWithError(0, "")
	}
	select {
	case line := <-asked:
		t.Errorf("the gateway was asked %q", line)
	default:
	}
}
