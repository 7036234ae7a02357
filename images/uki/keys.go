package uki

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Secure Boot's roles (UEFI specification 2.10, section 32.3): the platform key
// admits changes of KEK, KEK admits changes of db, and a key in db admits
// images.
const (
	rolePK  = "PK"
	roleKEK = "KEK"
	roleDB  = "db"
)

// keyValidity is how long a certificate says it is valid. Firmware does not
// check it; it is what people see.
const keyValidity = 10 * 365 * 24 * time.Hour

// Key is an RSA key with its self-signed certificate.
type Key struct {
	Private *rsa.PrivateKey
	Cert    *x509.Certificate
}

// Keys are one checkout's Secure Boot keys. They are made on first use and
// belong to nobody else: firmware that trusts them trusts no other vendor.
type Keys struct{ PK, KEK, DB Key }

// LoadKeys reads the keys in dir, and makes those that are not there. Each is a
// file ROLE.pem, mode 0600, with key and certificate; ROLE.crt is the
// certificate alone, for everybody.
func LoadKeys(dir string, now time.Time) (*Keys, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("keys: %w", err)
	}
	var k Keys
	for role, into := range map[string]*Key{rolePK: &k.PK, roleKEK: &k.KEK, roleDB: &k.DB} {
		key, err := readKey(dir, role)
		if errors.Is(err, fs.ErrNotExist) {
			if err = writeKey(dir, role, now); err == nil {
				key, err = readKey(dir, role)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("keys: %s: %w", role, err)
		}
		*into = *key
	}
	return &k, nil
}

// SecureBoot returns the public half of k.
func (k *Keys) SecureBoot() SecureBoot {
	return SecureBoot{PK: k.PK.Cert, KEK: k.KEK.Cert, DB: k.DB.Cert}
}

// LoadCertificates reads the public half of the keys in dir.
func LoadCertificates(dir string) (SecureBoot, error) {
	var s SecureBoot
	for role, into := range map[string]**x509.Certificate{rolePK: &s.PK, roleKEK: &s.KEK, roleDB: &s.DB} {
		b, err := os.ReadFile(filepath.Join(dir, role+".crt"))
		if err != nil {
			return SecureBoot{}, fmt.Errorf("keys: %w; make keys with: mkimage keys", err)
		}
		if *into, err = parseCertificate(b); err != nil {
			return SecureBoot{}, fmt.Errorf("keys: %s.crt: %w", role, err)
		}
	}
	return s, nil
}

func readKey(dir, role string) (*Key, error) {
	b, err := os.ReadFile(filepath.Join(dir, role+".pem"))
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("want a PRIVATE KEY and then a CERTIFICATE in PEM")
	}
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := private.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key is %T, firmware wants RSA", private)
	}
	cert, err := parseCertificate(rest)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("certificate is of another key")
	}
	return &Key{Private: key, Cert: cert}, nil
}

func parseCertificate(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no CERTIFICATE in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

func certificatePEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// writeKey makes ROLE.pem and ROLE.crt. RSA with 2,048 bits is what every
// firmware can verify (UEFI specification 2.10, section 32.3.1).
func writeKey(dir, role string, now time.Time) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	id := sha256.Sum256(x509.MarshalPKCS1PublicKey(&key.PublicKey))
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		Subject:               pkix.Name{CommonName: fmt.Sprintf("Sekisho %s %x", role, id[:4])},
		NotBefore:             now.UTC().Truncate(time.Second),
		NotAfter:              now.UTC().Truncate(time.Second).Add(keyValidity),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true,
		SignatureAlgorithm:    x509.SHA256WithRSA,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	cert := certificatePEM(&x509.Certificate{Raw: der})
	both := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), cert...)
	// The certificate goes first: a key file that exists is complete.
	if err := writeNew(filepath.Join(dir, role+".crt"), cert, 0o644); err != nil {
		return err
	}
	return writeNew(filepath.Join(dir, role+".pem"), both, 0o600)
}

// writeNew writes path in one step, so that a reader sees all of it or none.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(mode), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
