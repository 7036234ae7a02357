package piv

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync"
	"testing"
	"time"
)

// memory is a Store that survives what a test does to the card.
type memory struct {
	state PINState
	fail  error // of the next saves
	saves int
}

func (m *memory) LoadPIN() (PINState, error) { return m.state, nil }

func (m *memory) SavePIN(s PINState) error {
	if m.fail != nil {
		return m.fail
	}
	m.state = s
	m.saves++
	return nil
}

// softHost has keys in software, behind a gate that the test opens.
type softHost struct {
	keys map[Slot]crypto.PrivateKey

	mu   sync.Mutex
	open bool
	uses int // operations that were done
}

func (h *softHost) Use(_ context.Context, slot Slot, op Operation, input []byte, pin bool) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.open || !pin && slot != CardAuthentication {
		return nil, &Refusal{SecurityStatus, "gate shut"}
	}
	h.uses++
	switch k := h.keys[slot].(type) {
	case *rsa.PrivateKey:
		x := new(big.Int).SetBytes(input)
		if op != RSA || x.Cmp(k.N) >= 0 {
			return nil, &Refusal{WrongData, "not a block"}
		}
		return new(big.Int).Exp(x, k.D, k.N).FillBytes(make([]byte, k.Size())), nil
	case *ecdsa.PrivateKey:
		if op == SignECDSA {
			return ecdsa.SignASN1(rand.Reader, k, input)
		}
		ours, err := k.ECDH()
		if err != nil {
			return nil, err
		}
		theirs, err := ours.Curve().NewPublicKey(input)
		if err != nil {
			return nil, err
		}
		return ours.ECDH(theirs)
	}
	return nil, &Refusal{NoReference, "no key"}
}

// clock is a clock that the test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (h *softHost) shut(shut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open = !shut
}

type fixture struct {
	*Card
	t     testing.TB
	host  *softHost
	store *memory
	clock *clock
	cert  map[Slot]*x509.Certificate
}

const testPIN = "123456"

// newCard makes a card with RSA-2048 or P-256 in 9A, P-256 in 9C and 9E, P-384
// or P-256 in 9D.
func newCard(t testing.TB, rsaKey bool) *fixture {
	t.Helper()
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	f := &fixture{t: t, store: &memory{}, clock: &clock{now: time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)}, cert: map[Slot]*x509.Certificate{}}
	f.host = &softHost{open: true, keys: map[Slot]crypto.PrivateKey{
		Authentication: ec(elliptic.P256()), Signature: ec(elliptic.P384()), KeyManagement: ec(elliptic.P256()), CardAuthentication: ec(elliptic.P256()),
	}}
	if rsaKey {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		f.host.keys[Authentication] = k
	}
	ca := ec(elliptic.P256())
	p := Profile{GUID: [16]byte{1, 2, 3, 15: 16}, Expires: f.clock.now.AddDate(5, 0, 0), Name: "山田 太郎", Agency: "Example City", Keys: map[Slot]Key{}}
	for slot, k := range f.host.keys {
		public := k.(interface{ Public() crypto.PublicKey }).Public()
		usage := x509.KeyUsageDigitalSignature
		if slot == KeyManagement {
			usage = x509.KeyUsageKeyAgreement
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(int64(slot)), Subject: pkix.Name{CommonName: "taro " + slot.String()},
			NotBefore: f.clock.now.Add(-time.Hour), NotAfter: f.clock.now.AddDate(1, 0, 0),
			KeyUsage: usage,
		}, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}}, public, ca)
		if err != nil {
			t.Fatal(err)
		}
		if f.cert[slot], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		p.Keys[slot] = Key{public, der}
	}
	pin, err := OpenPIN(f.store)
	if err != nil {
		t.Fatal(err)
	}
	if err := pin.Limit(3); err != nil {
		t.Fatal(err)
	}
	if err := pin.Set(pad(t, testPIN)); err != nil {
		t.Fatal(err)
	}
	if f.Card, err = New(p, f.host, pin, f.clock.Now); err != nil {
		t.Fatal(err)
	}
	return f
}

func pad(t testing.TB, pin string) []byte {
	t.Helper()
	b, err := Pad(pin)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// send sends a command and returns data and status word, without fetching.
func (f *fixture) send(apdu ...byte) ([]byte, Status) {
	f.t.Helper()
	r := f.Transmit(f.t.Context(), apdu)
	if len(r) < 2 {
		f.t.Fatalf("response %x has no status word", r)
	}
	return r[:len(r)-2], Status(r[len(r)-2])<<8 | Status(r[len(r)-1])
}

// all sends a command and fetches its whole response.
func (f *fixture) all(apdu ...byte) ([]byte, Status) {
	f.t.Helper()
	data, sw := f.send(apdu...)
	for sw&0xff00 == MoreData {
		more, next := f.send(0, insGetResponse, 0, 0, byte(sw))
		data, sw = append(data, more...), next
	}
	return data, sw
}

func (f *fixture) want(status Status, apdu ...byte) []byte {
	f.t.Helper()
	data, sw := f.all(apdu...)
	if sw != status {
		f.t.Fatalf("%x: status %04X, want %04X", apdu[:min(len(apdu), 16)], uint16(sw), uint16(status))
	}
	return data
}

func (f *fixture) choose() {
	f.t.Helper()
	f.want(OK, append(append([]byte{0, insSelect, 4, 0, 9}, aid[:9]...), 0)...)
}

func (f *fixture) login() {
	f.t.Helper()
	f.want(OK, append([]byte{0, insVerify, 0, refApplicationPIN, 8}, pad(f.t, testPIN)...)...)
}

// challenge is a GENERAL AUTHENTICATE template.
func challenge(kind byte, input []byte) []byte {
	return tlv(nil, tagTemplate, tlv(tlv(nil, tagResponse, nil), uint32(kind), input))
}

// point makes the other side of a key agreement.
func point(t testing.TB) *ecdh.PrivateKey {
	t.Helper()
	k, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
