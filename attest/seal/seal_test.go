package seal

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"crypto/x509"
	"encoding/pem"

	"sekisho/attest"
	"sekisho/attest/approval"
)

func newSigner(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func refs() *attest.ReferenceValues {
	return &attest.ReferenceValues{Image: "sekisho", Version: "1", PCRs: map[int]attest.Digest{4: {4}, 7: {7}, 11: {11}, 15: {}}}
}

func signed(t testing.TB, signer *ecdsa.PrivateKey) ([]byte, ReleaseKey) {
	t.Helper()
	r, err := SignPolicy(signer, refs(), FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	data, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewReleaseKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	return data, key
}

func TestRelease(t *testing.T) {
	signer := newSigner(t)
	data, key := signed(t, signer)
	if _, err := ParseRelease(data, key); err != nil {
		t.Fatal(err)
	}
	_, other := signed(t, newSigner(t))
	if _, err := ParseRelease(data, other); err == nil {
		t.Error("accepted for another release key")
	}
	if _, err := ParseRelease(data, ReleaseKey{}); err == nil {
		t.Error("accepted for no release key")
	}
	for name, change := range map[string]func(*Release){
		"epoch":          func(r *Release) { r.Epoch++ },
		"epoch too low":  func(r *Release) { r.Epoch = 1 },
		"PCR 11":         func(r *Release) { r.PCRs[11] = attest.Digest{12} },
		"PCR 15":         func(r *Release) { r.PCRs[15] = attest.Digest{1} },
		"no PCR 7":       func(r *Release) { delete(r.PCRs, 7) },
		"login for disk": func(r *Release) { r.Disk = r.Login },
		"net for login":  func(r *Release) { r.Login = r.Net },
		"login for net":  func(r *Release) { r.Net = r.Login },
		"no net":         func(r *Release) { r.Net = nil },
		"raise as start": func(r *Release) { r.Start = r.Raise },
		"profile":        func(r *Release) { r.Profile = "x" },
	} {
		var r Release
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatal(err)
		}
		change(&r)
		bad, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseRelease(bad, key); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, c := range map[string]struct {
		epoch  uint64
		change func(*attest.ReferenceValues)
	}{
		"epoch below the first": {FirstEpoch - 1, func(*attest.ReferenceValues) {}},
		"epoch far away":        {1 << 40, func(*attest.ReferenceValues) {}},
		"PCR 15 used":           {FirstEpoch, func(r *attest.ReferenceValues) { r.PCRs[15] = attest.Digest{1} }},
		"no PCR 11":             {FirstEpoch, func(r *attest.ReferenceValues) { delete(r.PCRs, 11) }},
	} {
		r := refs()
		c.change(r)
		if _, err := SignPolicy(signer, r, c.epoch); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

func TestExplain(t *testing.T) {
	data, key := signed(t, newSigner(t))
	r, err := ParseRelease(data, key)
	if err != nil {
		t.Fatal(err)
	}
	at, above := uint64(FirstEpoch), uint64(FirstEpoch+1)
	if err := r.Explain(r.PCRs, &at); err != nil {
		t.Error(err)
	}
	if err := r.Explain(r.PCRs, &above); !errors.Is(err, ErrRolledBack) {
		t.Error(err)
	}
	var m *Mismatch
	if err := r.Explain(map[int]attest.Digest{7: r.PCRs[7], 11: {}}, &at); !errors.As(err, &m) || m.PCR != 11 {
		t.Error(err)
	}
	if r.Explain(r.PCRs, nil) == nil {
		t.Error("nothing to say about a missing counter")
	}
}

func TestRaiseTo(t *testing.T) {
	for _, c := range []struct {
		slot    Slot
		counter uint64
		raise   bool
	}{
		{Slot{}, 0, false}, {Slot{70, false}, 64, false}, {Slot{70, true}, 64, true}, {Slot{70, true}, 70, false}, {Slot{70, true}, 71, false},
	} {
		if to, raise := RaiseTo(c.slot, c.counter); raise != c.raise || raise && to != c.slot.Epoch {
			t.Errorf("%+v at %d: %d, %t", c.slot, c.counter, to, raise)
		}
	}
}

// software seals by keeping.
func software(kept *Secret) func(Secret) (Sealed, error) {
	return func(s Secret) (Sealed, error) {
		*kept = Secret{bytes.Clone(s.b)}
		return Sealed{Storage: make([]byte, 34), Public: []byte("p"), Private: []byte("q")}, nil
	}
}

func TestVolume(t *testing.T) {
	var kept Secret
	header := attest.Digest{1}
	v, key, recovery, err := NewVolume(PurposeDisk, header, software(&kept))
	if err != nil {
		t.Fatal(err)
	}
	data, err := v.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if v, err = ParseVolume(data); err != nil {
		t.Fatal(err)
	}
	secret := func() Secret { return Secret{bytes.Clone(kept.b)} }
	got, err := v.Open(secret(), header)
	if err != nil || !bytes.Equal(got.b, key.b) || bytes.Equal(key.b, kept.b) {
		t.Errorf("%v, %v", got, err)
	}
	used := secret()
	if _, err := v.Open(used, attest.Digest{2}); !errors.Is(err, ErrHeader) {
		t.Errorf("another header: %v", err)
	}
	if !bytes.Equal(used.b, make([]byte, SecretSize)) {
		t.Error("the secret was not wiped")
	}
	// Another volume's blob with this header, and this one's under another id.
	other := *v
	other.ID = bytes.Clone(v.ID)
	other.ID[0] ^= 1
	if _, err := other.Open(secret(), header); !errors.Is(err, ErrHeader) {
		t.Errorf("another volume id: %v", err)
	}

	// The recovery key opens it too, typed by a person, for this header only.
	typed, err := ParseRecovery(strings.ReplaceAll(recovery.Reveal(), "-", " ") + "\n")
	if err != nil {
		t.Fatal(err)
	}
	again, sealed, err := v.OpenRecovery(typed, header)
	if err != nil || !bytes.Equal(again.b, key.b) || !bytes.Equal(sealed.b, kept.b) {
		t.Errorf("recovery: %v", err)
	}
	if _, _, err := v.OpenRecovery(typed, attest.Digest{2}); !errors.Is(err, ErrHeader) {
		t.Errorf("recovery with another header: %v", err)
	}
	if _, _, err := v.OpenRecovery(NewRecovery(), header); err == nil {
		t.Error("another recovery key opened the volume")
	}
	if Measurement(key, attest.Digest{1}) == Measurement(key, attest.Digest{2}) {
		t.Error("the measurement does not depend on the device")
	}
}

func TestRecoveryText(t *testing.T) {
	r := NewRecovery()
	text := r.Reveal()
	if len(text) != 8*6+7 {
		t.Errorf("%d characters", len(text))
	}
	for i, c := range text {
		if c == '-' {
			continue
		}
		wrong := text[:i] + string('0'+(c-'0'+1)%10) + text[i+1:]
		if _, err := ParseRecovery(wrong); err == nil {
			t.Errorf("a wrong digit at %d was not noticed", i)
		}
	}
	for _, bad := range []string{"", "1", text + "-000000", strings.Repeat("9", 200)} {
		if _, err := ParseRecovery(bad); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestSecretsAreNotShown(t *testing.T) {
	s, r := Secret{[]byte("geheim")}, Recovery{Secret{[]byte("geheim0123456789")}}
	var b strings.Builder
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "s", s, "r", r)
	fmt.Fprintf(&b, "%v %+v %s %#v %v %+v", s, s, s, s, r, struct{ R Recovery }{r})
	if strings.Contains(b.String(), "geheim") || strings.Contains(b.String(), "103 101") {
		t.Error(b.String())
	}
}

// TestEscrow: a recovery key comes out for two signatures under a request for
// this very volume, in time, and not otherwise.
func TestEscrow(t *testing.T) {
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	org, a, b, stranger := newSigner(t), newSigner(t), newSigner(t), newSigner(t)
	var list []byte
	for _, k := range []*ecdsa.PrivateKey{a, b} {
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	approvers, err := approval.ParseApprovers(list, 2)
	if err != nil {
		t.Fatal(err)
	}
	var kept Secret
	v, _, recovery, err := NewVolume(PurposeDisk, attest.Digest{}, software(&kept))
	if err != nil {
		t.Fatal(err)
	}
	device := attest.Digest{9}
	e, err := NewEscrow(&org.PublicKey, device, v.ID, recovery, now)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if e, err = ParseEscrow(data); err != nil {
		t.Fatal(err)
	}
	good := RecoveryRequest{Device: device, Volume: v.ID, Reason: "board dead", Expires: now.Add(time.Hour)}
	for name, c := range map[string]struct {
		change  func(*RecoveryRequest)
		kind    string
		signers []*ecdsa.PrivateKey
		key     *ecdsa.PrivateKey
		want    bool
	}{
		"two signatures":         {signers: []*ecdsa.PrivateKey{a, b}, want: true},
		"one signature":          {signers: []*ecdsa.PrivateKey{a}},
		"one person twice":       {signers: []*ecdsa.PrivateKey{a, a}},
		"a stranger's":           {signers: []*ecdsa.PrivateKey{a, stranger}},
		"none":                   {},
		"expired":                {signers: []*ecdsa.PrivateKey{a, b}, change: func(r *RecoveryRequest) { r.Expires = now }},
		"another device":         {signers: []*ecdsa.PrivateKey{a, b}, change: func(r *RecoveryRequest) { r.Device = attest.Digest{1} }},
		"another volume":         {signers: []*ecdsa.PrivateKey{a, b}, change: func(r *RecoveryRequest) { r.Volume = make([]byte, 16) }},
		"approval of a permit":   {signers: []*ecdsa.PrivateKey{a, b}, kind: "permit"},
		"another escrow key":     {signers: []*ecdsa.PrivateKey{a, b}, key: stranger},
		"nobody is an approver ": {signers: nil, kind: ApproveRecovery},
	} {
		t.Run(name, func(t *testing.T) {
			req := good
			if c.change != nil {
				c.change(&req)
			}
			if c.kind == "" {
				c.kind = ApproveRecovery
			}
			s, err := approval.New(c.kind, req)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range c.signers {
				if err := s.Sign(k); err != nil {
					t.Fatal(err)
				}
			}
			if c.key == nil {
				c.key = org
			}
			got, who, err := e.Release(c.key, s, approvers, now)
			if (err == nil) != c.want || c.want && (got.Reveal() != recovery.Reveal() || len(who) != 2) {
				t.Errorf("%v, %v", who, err)
			}
			if _, _, err := e.Release(c.key, s, nil, now); err == nil {
				t.Error("released without approvers")
			}
		})
	}
	e.Device = attest.Digest{8} // an escrow passed off as another device's
	s, err := approval.New(ApproveRecovery, RecoveryRequest{Device: e.Device, Volume: e.Volume, Expires: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Sign(a), s.Sign(b)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.Release(org, s, approvers, now); err == nil {
		t.Error("an escrow was opened for another device than it was made for")
	}
}

func FuzzParseRelease(f *testing.F) {
	data, key := signed(f, newSigner(f))
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) { ParseRelease(data, key) })
}

func FuzzParseVolume(f *testing.F) {
	var kept Secret
	v, _, _, err := NewVolume(PurposeDisk, attest.Digest{}, software(&kept))
	if err != nil {
		f.Fatal(err)
	}
	data, err := v.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := ParseVolume(data)
		if err != nil {
			return
		}
		if _, err := v.Encode(); err != nil {
			t.Error(err)
		}
	})
}

func FuzzParseRecovery(f *testing.F) {
	f.Add(NewRecovery().Reveal())
	f.Fuzz(func(t *testing.T, text string) {
		if r, err := ParseRecovery(text); err == nil && len(r.secret.b) != recoverySize {
			t.Error(text)
		}
	})
}

func FuzzParseEscrow(f *testing.F) {
	f.Add([]byte(`{"profile":"` + escrowProfile + `","volume_id":"AAAAAAAAAAAAAAAAAAAAAA=="}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseEscrow(data) })
}
