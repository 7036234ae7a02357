package fleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sekisho/attest/verifier"
)

// loadNonceKey reads the key that the verifiers of an organisation share, in
// hexadecimal, and makes it on first use.
func loadNonceKey(path string) (key [verifier.NonceKeySize]byte, err error) {
	data, err := ownFile(path, func() ([]byte, error) {
		rand.Read(key[:])
		return []byte(hex.EncodeToString(key[:]) + "\n"), nil
	})
	if err != nil {
		return key, fmt.Errorf("nonce_key: %w", err)
	}
	b, err := hex.DecodeString(strings.TrimSpace(string(data)))
	if err != nil || len(b) != len(key) {
		return key, fmt.Errorf("nonce_key: %s: want %d bytes in hexadecimal", path, len(key))
	}
	return [verifier.NonceKeySize]byte(b), nil
}

// loadReportKey reads the key that signs results and reports, and makes it on
// first use.
func loadReportKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := ownFile(path, func() ([]byte, error) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
	if err != nil {
		return nil, fmt.Errorf("report_key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("report_key: %s: no PEM in it", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("report_key: %s: %w", path, err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("report_key: %s: %T, want ECDSA on P-256", path, k)
	}
	return ec, nil
}

// ownFile reads a file that only its owner may read; if there is none, it is
// made with what content returns, mode 0600.
func ownFile(path string, content func() ([]byte, error)) ([]byte, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		data, err := content()
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		return data, replace(path, data)
	}
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others may read it; chmod 600 and make a new key", path, info.Mode().Perm())
	}
	return readFile(path)
}

// replace writes a file, mode 0600, so that a power cut leaves the old one or
// the new one.
func replace(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
