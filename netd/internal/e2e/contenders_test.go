//go:build linux

package e2e

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// contender is a tunnel between two namespaces.
type contender struct {
	name  string
	far   string // inner address of the far end
	roles []*role
	other []*exec.Cmd // processes that are no roles
}

// addresses of the outer link.
const (
	outerNear = "203.0.113.1"
	outerFar  = "203.0.113.20"
)

// memory of near and far end in MiB.
func (c *contender) memory() (mib []string) {
	for _, r := range c.roles {
		mib = append(mib, fmt.Sprintf("%.0f", r.memory()))
	}
	for _, cmd := range c.other {
		mib = append(mib, fmt.Sprintf("%.0f", (&role{cmd: cmd}).memory()))
	}
	return mib
}

// inner gives the TUN devices of a contender their addresses, and ways to each other.
func inner(near, far *nstest.NS, dev, nearAddr, farAddr string, mtu int) {
	for _, e := range []struct {
		ns          *nstest.NS
		own, remote string
	}{{near, nearAddr, farAddr}, {far, farAddr, nearAddr}} {
		e.ns.Run("ip", "address", "add", e.own+"/32", "dev", dev)
		e.ns.Run("ip", "link", "set", dev, "up", "mtu", fmt.Sprint(mtu))
		e.ns.Run("ip", "route", "add", e.remote+"/32", "dev", dev)
	}
}

// paper is what gateway and laptop identify themselves with.
type paper struct{ ca, verifier *authority }

func newPaper(t testing.TB) paper {
	return paper{newAuthority(t, "City CA"), newAuthority(t, "Verifier CA")}
}

// laptop makes a laptop's certificate and key in PEM; id is a byte of its device's.
func (p paper) laptop(t testing.TB, id string, life time.Duration) (chain, key string) {
	return p.device(t, strings.Repeat(id, 32), life)
}

// device is laptop with the whole device id.
func (p paper) device(t testing.TB, id string, life time.Duration) (chain, key string) {
	k := newKey(t)
	cert := issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "laptop"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		URIs: []*url.URL{{Scheme: "urn", Opaque: "sekisho:device:" + id}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, p.verifier.cert, k.Public(), p.verifier.key)
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return certPEM(cert), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}

// newGateway plays a gateway in far.
func newGateway(t testing.TB, p paper, far *nstest.NS, c roleConfig) *role {
	chain, key := p.ca.server(t, "gateway.test")
	c.Chain, c.Key, c.Peers = string(chain), string(key), p.verifier.pem()
	if c.Leases == "" {
		c.Leases = filepath.Join(t.TempDir(), "leases.json")
	}
	if !c.Pool.IsValid() {
		c.Pool = netip.MustParsePrefix("10.80.0.0/16")
	}
	c.MTU = connectip.DefaultMTU
	return startRole(t, far, "gateway", c)
}

// newLaptop plays a laptop in near.
func newLaptop(t testing.TB, p paper, near *nstest.NS, c roleConfig) *role {
	c.Chain, c.Key = p.laptop(t, "ab", time.Hour)
	c.Peers, c.MTU = p.ca.pem(), connectip.DefaultMTU
	return startRole(t, near, "laptop", c)
}

// newSekisho opens a tunnel of ours over one carriage. n makes it differ from
// another in the same namespaces.
func newSekisho(t testing.TB, near, far *nstest.NS, name string, only connectip.Carriage, n int) *contender {
	p := newPaper(t)
	dev, listen := fmt.Sprintf("sekisho%d", n), fmt.Sprintf("%s:%d", outerFar, 443+n)
	pool := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(90 + n), 0, 0}), 16)
	g := newGateway(t, p, far, roleConfig{Tun: dev, Listen: listen, Pool: pool})
	l := newLaptop(t, p, near, roleConfig{Tun: dev, Gateway: listen, Only: only})
	if _, err := l.tell(order{Up: &tunnel.Path{}}); err != nil {
		t.Fatal(err)
	}
	// The gateway gives .2; .1 is its own.
	at := pool.Addr().Next()
	inner(near, far, dev, at.Next().String(), at.String(), connectip.DefaultMTU)
	return &contender{name: name, far: at.String(), roles: []*role{l, g}}
}

func newWireGuard(t testing.TB, near, far *nstest.NS) *contender {
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		k, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = k
	}
	text := func(own, peer *ecdh.PrivateKey, more string) string {
		return "private_key=" + hex.EncodeToString(own.Bytes()) + "\n" + more[:strings.IndexByte(more, '|')] +
			"public_key=" + hex.EncodeToString(peer.PublicKey().Bytes()) + "\n" + more[strings.IndexByte(more, '|')+1:]
	}
	f := startRole(t, far, "wireguard", roleConfig{Tun: "wg0", MTU: 1420, WireGuard: text(keys[0], keys[1], "listen_port=51820\n|allowed_ip=10.81.0.2/32\n")})
	n := startRole(t, near, "wireguard", roleConfig{Tun: "wg0", MTU: 1420, WireGuard: text(keys[1], keys[0], "|endpoint="+outerFar+":51820\nallowed_ip=10.81.0.1/32\n")})
	inner(near, far, "wg0", "10.81.0.2", "10.81.0.1", 1420)
	return &contender{name: "wireguard-go", far: "10.81.0.1", roles: []*role{n, f}}
}

// newOpenVPN runs OpenVPN over UDP with AES-256-GCM.
func newOpenVPN(t testing.TB, near, far *nstest.NS) *contender {
	if _, err := exec.LookPath("openvpn"); err != nil {
		t.Fatalf("%v: install openvpn", err)
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	p := newPaper(t)
	chain, key := p.ca.server(t, "gateway.test")
	cert, clientKey := p.laptop(t, "cd", time.Hour)
	common := []string{"--dev", "ovpn0", "--dev-type", "tun", "--proto", "udp4", "--verb", "3", "--cipher", "AES-256-GCM", "--data-ciphers", "AES-256-GCM", "--disable-dco"}
	server := far.Start("openvpn", append(common, "--server", "10.82.0.0", "255.255.255.0", "--topology", "subnet", "--local", outerFar, "--dh", "none",
		"--ca", write("v.pem", []byte(p.verifier.pem())), "--cert", write("s.pem", chain), "--key", write("s.key", key))...)
	client := near.Start("openvpn", append(common, "--client", "--remote", outerFar, "--nobind",
		"--ca", write("c.pem", []byte(p.ca.pem())), "--cert", write("l.pem", []byte(cert)), "--key", write("l.key", []byte(clientKey)))...)
	nstest.Eventually(t, 20*time.Second, func() error {
		_, err := dialFrom(near, "tcp", "10.82.0.1:1")
		if errors.Is(err, syscall.ECONNREFUSED) { // by the far end: it is reached
			return nil
		}
		return err
	})
	return &contender{name: "openvpn", far: "10.82.0.1", other: []*exec.Cmd{client, server}}
}
