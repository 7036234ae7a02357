package attester_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
	"sekisho/attest/verifier"
)

// TestNetworkState takes what netd keeps through a laptop's life on a real TPM:
// without a verifier, over power cuts, after the disk's key was used; another
// image gets nothing and destroys nothing, another TPM begins anew.
func TestNetworkState(t *testing.T) {
	e := tpmtest.Start(t)
	extend := func(pcr int, d attest.Digest) {
		t.Helper()
		dev, err := tpm.Open(e.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(dev.Extend(pcr, d), dev.Close()); err != nil {
			t.Fatal(err)
		}
	}
	boot := image.Boot()
	measure := func() {
		for _, x := range boot.Extensions {
			extend(x.PCR, x.Digest)
		}
	}
	measure()
	r, err := seal.SignPolicy(newKey(t), &attest.ReferenceValues{Image: "sekisho", Version: "1", PCRs: boot.PCRs()}, seal.FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	release, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	m := machine{boot: boot, roots: e.Roots, open: func() (attester.Hardware, error) { return tpm.Open(e.Socket) }, events: writeFile(t, "")}
	s := newSite(t, m.roots, time.Hour)
	s.stop() // nobody is needed for any of this
	state := newState(t, attest.Ticket{})
	start := func() *laptop { return newLaptop(t, s, m, state) }
	refused := func(p *laptop, code string) {
		t.Helper()
		var no *gate.KeyRefused
		if _, err := p.client.NetworkState(t.Context()); !errors.As(err, &no) || !slices.Contains(no.Codes, code) {
			t.Errorf("read: %v, want %s", err, code)
		}
		if err := p.client.SaveNetworkState(t.Context(), []byte("x")); !errors.As(err, &no) || !slices.Contains(no.Codes, code) {
			t.Errorf("saved: %v, want %s", err, code)
		}
	}
	holds := func(p *laptop, want string) {
		t.Helper()
		if got, err := p.client.NetworkState(t.Context()); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	save := func(p *laptop, text string) {
		t.Helper()
		if err := p.client.SaveNetworkState(t.Context(), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}

	m.release = t.TempDir() + "/absent"
	p := start()
	refused(p, gate.CodePolicy) // an image without signed policies
	p.stop()

	m.release = writeFile(t, string(release))
	p = start()
	holds(p, "")
	save(p, "the hotel's passphrase, and more of it")
	p.stop()
	extend(15, attest.Digest{1}) // the disk's key was used
	p = start()
	save(p, "home")
	holds(p, "home")
	p.stop()
	disk, err := os.ReadFile(state.Path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(disk, []byte("home")) || bytes.Count(disk, []byte("SKNETWK1")) != 2 {
		t.Error("it is in the clear, or not in both places")
	}
	p = start()
	holds(p, "home")
	p.stop()

	e.Restart()
	measure()
	p = start()
	holds(p, "home")
	p.stop()

	e.Restart() // another image: PCR 11 is not what was signed
	measure()
	extend(11, attest.Digest{2})
	p = start()
	refused(p, gate.CodeImage)
	p.stop()

	e.Restart()
	measure()
	p = start()
	holds(p, "home")
	p.stop()

	other := tpmtest.Start(t) // the disk in another laptop
	e = other
	measure()
	p = start()
	holds(p, "")
	save(p, "here")
	holds(p, "here")
}

// TestForgottenIsGone: of what was saved before nothing is left on the disk,
// also after a power cut between the two writes, and each cut leaves a state.
func TestForgottenIsGone(t *testing.T) {
	path := newState(t, attest.Ticket{}).Path
	f := attester.NetFile(path)
	read := func() []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	store := func(text string) []byte {
		if err := f.Store([]byte(text)); err != nil {
			t.Fatal(err)
		}
		return read()
	}
	const old = "a long record with the network of a hotel"
	before := store(old)
	after := store("home")
	if bytes.Contains(after, []byte("hotel")) {
		t.Error("the older record is still there")
	}
	half := len(after) / 2
	cut := append(bytes.Clone(after[:half]), before[half:]...) // one slot is new, one is old
	if err := os.WriteFile(path, cut, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Load(); err != nil || string(got) != "home" && string(got) != old {
		t.Fatalf("after the cut: %q, %v", got, err)
	}
	if got, err := f.Load(); err != nil || string(got) != "home" || bytes.Contains(read(), []byte("hotel")) {
		t.Errorf("after the cut: %q, %v, or the older record is still there", got, err)
	}
}

// TestNetworkIdentity: an affirmed laptop gets a certificate for its network
// identity that opens no gate, and only for a key that it has.
func TestNetworkIdentity(t *testing.T) {
	boot := image.Boot()
	m := software(t, boot)
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	key := newKey(t)
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	p.untilState(gate.StateAffirming)
	der, err := p.client.NetworkCertificate(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	device := s.enrolled()[0].ID
	if !key.PublicKey.Equal(cert.PublicKey) || cert.Subject.CommonName != device.String() || len(cert.URIs) != 1 || cert.URIs[0].String() != verifier.NetworkPrefix+device.String() {
		t.Errorf("subject %s, names %v", cert.Subject, cert.URIs)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.service.Issuer.CA())
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Error("gates would open for it")
	}
	forged := bytes.Clone(request)
	forged[len(forged)-1] ^= 1
	for name, r := range map[string][]byte{"forged": forged, "empty": nil} {
		if _, err := p.client.NetworkCertificate(t.Context(), r); err == nil {
			t.Errorf("%s request: certified", name)
		}
	}
	if _, err := s.service.Network(t.Context(), attest.NetworkRequest{Request: request, Chain: [][]byte{der}, Signature: []byte{1}}); err == nil {
		t.Error("a network certificate asked for another")
	}
	if _, err := verifier.NewNetworkIssuer(s.devices.cert, s.devices.key, s.devices.cert, "Test City", verifier.MinNetworkLifetime); err == nil {
		t.Error("the devices' CA may issue network identities")
	}
}
