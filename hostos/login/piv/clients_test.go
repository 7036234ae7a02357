package piv

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/hostos/login/piv/pivtest"
)

// reader is a pcscd with our card in it.
type reader struct {
	*pivtest.Reader
	t *testing.T
}

// OpenSC over a real pcscd finds the card, reads it, logs in, signs, agrees on
// keys, changes the PIN and blocks it.
func TestOpenSC(t *testing.T) {
	pivtest.Need(t, "pcscd", "opensc-tool", "piv-tool", "pkcs11-tool", "pkcs15-tool", "openssl")
	for name, rsaKey := range map[string]bool{"RSA-2048": true, "P-256": false} {
		t.Run(name, func(t *testing.T) {
			f := newCard(t, rsaKey)
			r := reader{pivtest.Start(t, f.Card, ATR()), t}
			r.says("Personal Identity Verification Card", "opensc-tool", "--name")
			r.Must("piv-tool", "--serial", "--name")
			dump := r.Must("pkcs15-tool", "--dump")
			for _, want := range []string{"PIV AUTH key", "SIGN key", "KEY MAN key", "CARD AUTH key", "Certificate for PIV Authentication"} {
				if !strings.Contains(dump, want) {
					t.Errorf("pkcs15-tool --dump says nothing of %q:\n%s", want, dump)
				}
			}
			r.says("No errors", "pkcs11-tool", "--test", "--login", "--pin", testPIN)
			r.signs(f, rsaKey)
			if !rsaKey {
				r.agrees(f)
			}
			out, err := r.Run("pkcs11-tool", "--login", "--pin", "654321", "--list-objects")
			if err == nil || !strings.Contains(out, "CKR_PIN_INCORRECT") || f.store.state.Left != 2 {
				t.Errorf("a wrong PIN: %v, %d tries left, want 2\n%s", err, f.store.state.Left, out)
			}
			r.Must("pkcs15-tool", "--change-pin", "--auth-id", "01", "--pin", testPIN, "--new-pin", "87654321")
			for range 3 {
				out, err = r.Run("pkcs11-tool", "--login", "--pin", testPIN, "--list-objects")
			}
			if err == nil || !strings.Contains(out, "CKR_PIN_LOCKED") {
				t.Errorf("after three wrong PINs: %v\n%s", err, out)
			}
			if out, err = r.Run("pkcs11-tool", "--login", "--pin", "87654321", "--list-objects"); err == nil {
				t.Errorf("a blocked PIN was taken:\n%s", out)
			}
		})
	}
}

// says runs a program that has to succeed and say want.
func (r reader) says(want, program string, args ...string) {
	r.t.Helper()
	if out := r.Must(program, args...); !strings.Contains(out, want) {
		r.t.Errorf("%s %s says nothing of %q:\n%s", program, strings.Join(args, " "), want, out)
	}
}

// signs has the card sign a file by PKCS #11 and checks the signature.
func (r reader) signs(f *fixture, rsaKey bool) {
	r.t.Helper()
	message := []byte("関所")
	input := message
	if !rsaKey { // OpenSC has the caller hash
		digest := sha256.Sum256(message)
		input = digest[:]
	}
	if err := os.WriteFile(filepath.Join(r.Dir, "message"), input, 0o600); err != nil {
		r.t.Fatal(err)
	}
	mechanism, alg := "ECDSA", x509.ECDSAWithSHA256
	args := []string{"--signature-format", "openssl"}
	if rsaKey {
		mechanism, alg, args = "SHA256-RSA-PKCS", x509.SHA256WithRSA, nil
	}
	r.Must("pkcs11-tool", append([]string{"--login", "--pin", testPIN, "--sign", "--id", "01", "--mechanism", mechanism,
		"--input-file", "message", "--output-file", "signature"}, args...)...)
	signature, err := os.ReadFile(filepath.Join(r.Dir, "signature"))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := f.cert[Authentication].CheckSignature(alg, message, signature); err != nil {
		r.t.Error(err)
	}
	// The gate shut: the same command fails.
	f.host.shut(true)
	defer f.host.shut(false)
	if out, err := r.Run("pkcs11-tool", append([]string{"--login", "--pin", testPIN, "--sign", "--id", "01", "--mechanism", mechanism,
		"--input-file", "message", "--output-file", "none"}, args...)...); err == nil || !strings.Contains(out, "CKR_USER_NOT_LOGGED_IN") {
		r.t.Errorf("with the gate shut: %v\n%s", err, out)
	}
}

// agrees has the card's 9D agree with a key of ours.
func (r reader) agrees(f *fixture) {
	r.t.Helper()
	ours := point(r.t)
	public, err := x509.MarshalPKIXPublicKey(ours.Public())
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir, "peer"), public, 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.Must("pkcs11-tool", "--login", "--pin", testPIN, "--derive", "--id", "03", "--mechanism", "ECDH1-COFACTOR-DERIVE", "--input-file", "peer", "--output-file", "secret")
	got, err := os.ReadFile(filepath.Join(r.Dir, "secret"))
	if err != nil {
		r.t.Fatal(err)
	}
	theirs, err := f.host.keys[KeyManagement].(*ecdsa.PrivateKey).PublicKey.ECDH()
	if err != nil {
		r.t.Fatal(err)
	}
	want, err := ours.ECDH(theirs)
	if err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		r.t.Errorf("the card agreed on %x, we on %x", got, want)
	}
}
