// Package gateway is the server end of the tunnel. It admits a laptop for as
// long as the certificate lasts that the verifier gave it, gives each device
// always the same inner address, and passes packets between the sessions and
// one TUN device: from a laptop only with its own inner address as source, to
// a laptop only with that address as destination.
package gateway

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"sekisho/attest/cryptrec"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// maxFile bounds the configuration, certificate and key files in bytes.
const maxFile = 256 << 10

// Config is the gateway's configuration file.
type Config struct {
	Listen       netip.AddrPort        `json:"listen"`                 // address, and port of the tunnel on TCP and UDP
	Certificate  string                `json:"certificate"`            // PEM file: the gateway's chain, of the organisation's CA
	Key          string                `json:"key"`                    // PEM file: its private key
	ClientCA     string                `json:"client_ca"`              // PEM file: the CA that the verifier issues laptops' certificates with
	Pool         netip.Prefix          `json:"pool"`                   // IPv4 inner addresses; the first is the gateway's own
	Pool6        netip.Prefix          `json:"pool6,omitzero"`         // IPv6 inner addresses, at least as many; none if absent
	Leases       string                `json:"leases"`                 // file: device id to inner address
	Tun          string                `json:"tun"`                    // name of the TUN device, made by the gateway
	LGWAN        string                `json:"lgwan"`                  // name of the link towards LGWAN
	MTU          int                   `json:"mtu"`                    // of inner packets in bytes; 1400 if absent
	DNS          []netip.Addr          `json:"dns"`                    // resolvers for the work domain; may be empty
	MaxSessions  int                   `json:"max_sessions"`           // 10000 if absent
	Revocations  *FeedConfig           `json:"revocations"`            // verifiers to hear of revoked devices from; none if absent
	KeyAgreement cryptrec.KeyAgreement `json:"key_agreement,omitzero"` // the least; p256-mlkem768 if absent
	Metrics      string                `json:"metrics"`                // address of the metrics for Prometheus, ":9465" on loopback; none if absent
	Status       string                `json:"status"`                 // unix socket of the status; /run/sekisho-gateway/status.sock if absent
}

// DefaultStatus is the status socket unless the configuration names another.
const DefaultStatus = "/run/sekisho-gateway/status.sock"

// ReadConfig reads the Config in a file.
func ReadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	return ParseConfig(data)
}

// ParseConfig reads and validates a Config. Unknown fields are errors.
func ParseConfig(data []byte) (*Config, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("gateway configuration: %d bytes, at most %d", len(data), maxFile)
	}
	c := &Config{MTU: connectip.DefaultMTU, MaxSessions: 10000, Status: DefaultStatus}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, fmt.Errorf("gateway configuration: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("gateway configuration: data after the document")
	}
	return c, c.validate()
}

func (c *Config) validate() error {
	var errs []error
	fail := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("gateway configuration: "+format, a...))
	}
	if !c.Listen.IsValid() || c.Listen.Port() == 0 {
		fail("listen %q: want an IP address and a port", c.Listen)
	}
	for name, v := range map[string]string{"certificate": c.Certificate, "key": c.Key, "client_ca": c.ClientCA, "leases": c.Leases, "status": c.Status} {
		if v == "" {
			fail("%s: want a file name", name)
		}
	}
	for name, v := range map[string]string{"tun": c.Tun, "lgwan": c.LGWAN} {
		if v == "" || len(v) > 15 { // IFNAMSIZ less the final zero
			fail("%s %q: want a link name of 1 to 15 bytes", name, v)
		}
	}
	if c.Tun == c.LGWAN {
		fail("tun and lgwan are both %q", c.Tun)
	}
	if !c.Pool.IsValid() || !c.Pool.Addr().Is4() || c.Pool.Bits() < 8 || c.Pool.Bits() > 30 || c.Pool.Masked() != c.Pool {
		fail("pool %q: want an IPv4 prefix of /8 to /30", c.Pool)
	}
	if p := c.Pool6; p.IsValid() && (!p.Addr().Is6() || p.Addr().Is4In6() || p.Masked() != p || p.Bits() < 16 || p.Bits() > 126 || 128-p.Bits() < 32-c.Pool.Bits()) {
		fail("pool6 %q: want an IPv6 prefix of /16 to /126 with as many addresses as pool", p)
	}
	if c.Pool6.IsValid() && c.MTU < 1280 {
		fail("mtu %d with pool6: want at least 1280 (RFC 8200, section 5)", c.MTU)
	}
	if c.MTU < tunnel.MinMTU || c.MTU > tunnel.MaxMTU {
		fail("mtu %d: want %d to %d", c.MTU, tunnel.MinMTU, tunnel.MaxMTU)
	}
	if len(c.DNS) > 4 {
		fail("dns: %d entries, at most 4", len(c.DNS))
	}
	if c.MaxSessions < 1 || c.MaxSessions > 1<<20 {
		fail("max_sessions %d: want 1 to %d", c.MaxSessions, 1<<20)
	}
	return errors.Join(errs...)
}

// Self is the gateway's own inner address.
func (c *Config) Self() netip.Addr { return c.Pool.Addr().Next() }

// inner returns the inner addresses of the device that has the lease v4: the
// IPv6 one stands at the same place in its pool.
func (c *Config) inner(v4 netip.Addr) []netip.Addr {
	if !c.Pool6.IsValid() {
		return []netip.Addr{v4}
	}
	from, at := c.Pool.Addr().As4(), v4.As4()
	n := binary.BigEndian.Uint32(at[:]) - binary.BigEndian.Uint32(from[:])
	v6 := c.Pool6.Addr().As16()
	low := binary.BigEndian.Uint32(v6[12:]) // the pool has at least as many low bits as n, all zero
	binary.BigEndian.PutUint32(v6[12:], low|n)
	return []netip.Addr{v4, netip.AddrFrom16(v6)}
}

// Plan is what the gateway asks of its host's kernel.
func (c *Config) Plan() plan.Namespace {
	g := plan.Gateway{Tun: c.Tun, LGWAN: c.LGWAN, Self: c.Self(), Pool: c.Pool, Pool6: c.Pool6, MTU: c.MTU}
	if c.Pool6.IsValid() {
		g.Self6 = c.Pool6.Addr().Next()
	}
	return plan.MakeGateway(g)
}

// TLS returns the configuration in which a finished handshake proves that the
// client has a certificate in force, for client authentication, of ClientCA.
func (c *Config) TLS() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return nil, fmt.Errorf("gateway certificate: %w", err)
	}
	pem, err := os.ReadFile(c.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("client ca: %w", err)
	}
	pool := x509.NewCertPool()
	if len(pem) > maxFile || !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("client ca %s: no certificate in it", c.ClientCA)
	}
	t := c.KeyAgreement.Config()
	t.Certificates = []tls.Certificate{pair}
	t.ClientCAs = pool
	t.ClientAuth = tls.RequireAndVerifyClientCert
	t.NextProtos = []string{"http/1.1"}
	t.DynamicRecordSizingDisabled = true
	return t, nil
}
