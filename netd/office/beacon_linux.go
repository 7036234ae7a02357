package office

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"

	"sekisho/attest/cryptrec"
)

const (
	maxFile      = 256 << 10 // bytes of a configuration or certificate file
	maxLaptops   = 4096      // connections at once
	perLaptop    = 8         // of them of one address
	handshakeEnd = 5 * time.Second
	idle         = 10 * time.Second // between questions
	minPause     = 2 * time.Millisecond
)

// BeaconConfig is the configuration file of a beacon.
type BeaconConfig struct {
	Site        string         `json:"site"`        // as in the certificate's URI name
	Interface   string         `json:"interface"`   // the LAN's; one beacon for each LAN
	Listen      netip.AddrPort `json:"listen"`      // address and TCP port on it
	Certificate string         `json:"certificate"` // PEM file: chain of the office CA
	Key         string         `json:"key"`         // PEM file: its private key
	ClientCA    string         `json:"client_ca"`   // PEM file: the CA of the laptops' certificates
	// Networks are reached by laptops over the LAN directly. The LAN's own
	// prefix, if it shall be, is one of them.
	Networks []netip.Prefix `json:"networks"`
	// KeyAgreement is the least; p256-mlkem768 if absent.
	KeyAgreement cryptrec.KeyAgreement `json:"key_agreement,omitzero"`
}

// ParseBeaconConfig reads and validates a BeaconConfig. Unknown fields are errors.
func ParseBeaconConfig(data []byte) (*BeaconConfig, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("beacon configuration: %d bytes, at most %d", len(data), maxFile)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var c BeaconConfig
	if err := d.Decode(&c); err != nil {
		return nil, fmt.Errorf("beacon configuration: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("beacon configuration: data after the document")
	}
	var errs []error
	if !c.Listen.Addr().Is4() || c.Listen.Port() == 0 {
		errs = append(errs, fmt.Errorf("beacon configuration: listen %q: want an IPv4 address and a port", c.Listen))
	}
	for name, v := range map[string]string{"site": c.Site, "interface": c.Interface, "certificate": c.Certificate, "key": c.Key, "client_ca": c.ClientCA} {
		if v == "" {
			errs = append(errs, fmt.Errorf("beacon configuration: %s is missing", name))
		}
	}
	if len(c.Networks) == 0 || len(c.Networks) > maxNetworks {
		errs = append(errs, fmt.Errorf("beacon configuration: %d networks, want 1 to %d", len(c.Networks), maxNetworks))
	}
	for _, n := range c.Networks {
		if err := CheckNetwork(n); err != nil {
			errs = append(errs, fmt.Errorf("beacon configuration: %w", err))
		}
	}
	return &c, errors.Join(errs...)
}

// Beacon is the server. Make one with NewBeacon.
type Beacon struct {
	config    *BeaconConfig
	tls       *tls.Config
	key       *ecdsa.PrivateKey
	hardware  string
	on        netip.Prefix // the interface's own
	neighbour Neighbour
	log       *slog.Logger

	answered, refused atomic.Uint64
	mu                sync.Mutex
	from              map[netip.Addr]int
}

// Neighbour looks up the hardware address of a neighbour on a link.
type Neighbour func(link string, a netip.Addr) (net.HardwareAddr, error)

// NewBeacon reads the files that config names.
func NewBeacon(config *BeaconConfig, neighbour Neighbour, log *slog.Logger) (*Beacon, error) {
	pair, err := tls.LoadX509KeyPair(config.Certificate, config.Key)
	if err != nil {
		return nil, fmt.Errorf("beacon certificate: %w", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("beacon key of type %T, want ECDSA", pair.PrivateKey)
	}
	if err := names(pair.Leaf, config.Site); err != nil {
		return nil, fmt.Errorf("beacon certificate %s: %w", config.Certificate, err)
	}
	pem, err := os.ReadFile(config.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("client ca: %w", err)
	}
	pool := x509.NewCertPool()
	if len(pem) > maxFile || !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("client ca %s: no certificate in it", config.ClientCA)
	}
	t := config.KeyAgreement.Config()
	t.Certificates, t.ClientCAs, t.ClientAuth = []tls.Certificate{pair}, pool, tls.RequireAndVerifyClientCert
	t.NextProtos = []string{protocol}
	return &Beacon{config: config, tls: t, key: key, neighbour: neighbour, log: log, from: map[netip.Addr]int{}}, nil
}

// Listen opens the beacon's socket on its interface.
func (b *Beacon) Listen(ctx context.Context) (net.Listener, error) {
	ifi, err := net.InterfaceByName(b.config.Interface)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", b.config.Interface, err)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", b.config.Interface, err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.Equal(b.config.Listen.Addr().AsSlice()) {
			bits, _ := n.Mask.Size()
			b.on = netip.PrefixFrom(b.config.Listen.Addr(), bits)
		}
	}
	if !b.on.IsValid() {
		return nil, fmt.Errorf("interface %s does not have the address %s", b.config.Interface, b.config.Listen.Addr())
	}
	b.hardware = ifi.HardwareAddr.String()
	lc := net.ListenConfig{Control: bind(b.config.Interface), KeepAlive: -1}
	return lc.Listen(ctx, "tcp4", b.config.Listen.String())
}

// Serve answers laptops on l until ctx is done. It closes l and every connection.
func (b *Beacon) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	l = netutil.LimitListener(l, maxLaptops)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		all.Go(func() {
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			defer c.Close()
			if err := b.serve(ctx, c); err != nil && !errors.Is(err, io.EOF) && ctx.Err() == nil {
				b.refused.Add(1)
				b.log.Warn("laptop refused", "remote", c.RemoteAddr(), "err", err)
			}
		})
	}
}

// Counts returns how many questions were answered and how many connections refused.
func (b *Beacon) Counts() (answered, refused uint64) { return b.answered.Load(), b.refused.Load() }

func (b *Beacon) serve(ctx context.Context, c net.Conn) error {
	remote, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return err
	}
	if !b.on.Contains(remote.Addr()) {
		return fmt.Errorf("%s is not on the LAN %s", remote, b.on.Masked())
	}
	if !b.enter(remote.Addr()) {
		return fmt.Errorf("%s has %d connections already", remote.Addr(), perLaptop)
	}
	defer b.leave(remote.Addr())
	conn := tls.Server(c, b.tls)
	c.SetDeadline(time.Now().Add(handshakeEnd))
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	state := conn.ConnectionState()
	if err := b.config.KeyAgreement.Check(state); err != nil {
		return err
	}
	end := slices.MinFunc(state.VerifiedChains[0], func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
	in := lines{r: conn}
	for {
		now := time.Now()
		if !now.Before(end) {
			return fmt.Errorf("the laptop's certificate lapsed at %s", end)
		}
		c.SetDeadline(now.Add(min(idle, end.Sub(now))))
		var q Question
		if err := in.read(&q); err != nil {
			return err
		}
		a, refusal := b.answer(q, remote, state)
		if err := write(conn, a); err != nil {
			return err
		}
		if refusal != nil {
			return refusal
		}
		b.answered.Add(1)
		time.Sleep(minPause) // nobody needs signatures faster
	}
}

// answer states what we see, unless it differs from what the laptop says.
func (b *Beacon) answer(q Question, remote netip.AddrPort, state tls.ConnectionState) (Answer, error) {
	seen, err := b.neighbour(b.config.Interface, remote.Addr())
	switch {
	case err != nil:
		err = fmt.Errorf("hardware address of %s: %w", remote.Addr(), err)
	case len(q.Nonce) != NonceSize:
		err = fmt.Errorf("nonce of %d bytes, want %d", len(q.Nonce), NonceSize)
	case q.Laptop != remote || q.Hardware != seen.String():
		err = fmt.Errorf("laptop says that it is %s (%.64s), it is seen at %s (%s): relayed", q.Laptop, q.Hardware, remote, seen)
	}
	if err != nil {
		return Answer{Refused: err.Error()}, err
	}
	a, err := sign(Statement{
		Site: b.config.Site, Nonce: q.Nonce, Laptop: remote, LaptopHardware: seen.String(),
		Beacon: b.config.Listen, BeaconHardware: b.hardware, Networks: b.config.Networks, Life: int(Life.Milliseconds()),
	}, state, b.key)
	if err != nil {
		return Answer{Refused: "the beacon cannot sign"}, err
	}
	return a, nil
}

func (b *Beacon) enter(a netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.from[a] >= perLaptop {
		return false
	}
	b.from[a]++
	return true
}

func (b *Beacon) leave(a netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.from[a]--; b.from[a] <= 0 {
		delete(b.from, a)
	}
}
