package approval

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"testing"
)

func keys(t testing.TB, n int) (list []*ecdsa.PrivateKey, text []byte) {
	t.Helper()
	for range n {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, k)
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	return list, text
}

func TestVerify(t *testing.T) {
	k, text := keys(t, 3)
	a, err := ParseApprovers(text, 2)
	if err != nil {
		t.Fatal(err)
	}
	stranger, _ := keys(t, 1)
	for name, c := range map[string]struct {
		signers []*ecdsa.PrivateKey
		change  func(*Signed)
		ok      bool
	}{
		"two":             {signers: k[:2], ok: true},
		"three":           {signers: k, ok: true},
		"one":             {signers: k[:1]},
		"one twice":       {signers: []*ecdsa.PrivateKey{k[0], k[0]}},
		"with a stranger": {signers: []*ecdsa.PrivateKey{k[0], stranger[0]}},
		"other payload":   {signers: k, change: func(s *Signed) { s.Payload = []byte(`{"x":2}`) }},
		"other type":      {signers: k, change: func(s *Signed) { s.Type = "other" }},
		"other key's name": {signers: k[:1], change: func(s *Signed) {
			s.Signatures = append(s.Signatures, Signature{a.any(k[0], t), s.Signatures[0].Signature})
		}},
	} {
		s, err := New("kind", map[string]int{"x": 1})
		if err != nil {
			t.Fatal(err)
		}
		for _, signer := range c.signers {
			if err := s.Sign(signer); err != nil {
				t.Fatal(err)
			}
		}
		if c.change != nil {
			c.change(s)
		}
		data, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if s, err = Parse(data); err != nil {
			t.Fatal(err)
		}
		if _, _, err := a.Verify("kind", s); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrNotApproved) {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, err := new(Approvers).Verify("kind", s); err == nil {
			t.Errorf("%s: the zero Approvers approve", name)
		}
	}
}

// any returns the name of a key that is not k's.
func (a *Approvers) any(k *ecdsa.PrivateKey, t *testing.T) (id [32]byte) {
	own, err := fingerprint(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	for other := range a.keys {
		if other != own {
			return other
		}
	}
	return id
}

func TestParseApprovers(t *testing.T) {
	_, text := keys(t, 2)
	for name, c := range map[string]struct {
		text []byte
		need int
	}{
		"one signature is enough": {text, 1},
		"more than there are":     {text, 3},
		"a key twice":             {append(text, text...), 2},
		"none":                    {nil, 2},
	} {
		if _, err := ParseApprovers(c.text, c.need); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"profile":"` + Profile + `","type":"t","payload":"e30=","signatures":[]}`))
	_, text := keys(f, 2)
	a, err := ParseApprovers(text, 2)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := Parse(data); err == nil {
			if _, _, err := a.Verify(s.Type, s); err == nil {
				t.Error("approved without the keys")
			}
		}
	})
}
