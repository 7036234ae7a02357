//go:build linux

package access

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sekisho/attest/gate"
	"sekisho/netd/uplink/wpa"
)

// kept is what is kept, in the clear: for the vault, which encrypts it, and for
// a file in memory.
type kept struct {
	Networks    []byte `json:"networks,omitempty"`    // of wpa.Encode
	Key         []byte `json:"key,omitempty"`         // of the identity, SEC 1
	Certificate []byte `json:"certificate,omitempty"` // of it, DER
}

// file is kept with whether the vault was read for it.
type file struct {
	kept
	Read bool `json:"read"`
}

var errNoIdentity = errors.New("no network identity")

// certificate is that of the identity.
func (k kept) certificate() (*x509.Certificate, error) {
	if len(k.Key) == 0 || len(k.Certificate) == 0 {
		return nil, errNoIdentity
	}
	return x509.ParseCertificate(k.Certificate)
}

// encode is the inverse of decode; bytes cannot fail to be JSON.
func (k kept) encode() []byte {
	data, _ := json.Marshal(k)
	return data
}

// decode reads what encode made; nothing is an empty kept.
func decode(data []byte) (kept, error) {
	var k kept
	if len(data) == 0 {
		return k, nil
	}
	if len(data) > gate.MaxNetworkState {
		return k, fmt.Errorf("networks: %d bytes, at most %d", len(data), gate.MaxNetworkState)
	}
	if err := json.Unmarshal(data, &k); err != nil {
		return kept{}, fmt.Errorf("networks: %w", err)
	}
	if err := k.check(); err != nil {
		return kept{}, err
	}
	return k, nil
}

// check reports whether k can be used.
func (k kept) check() error {
	if _, err := k.networks(); err != nil {
		return err
	}
	if len(k.Key) == 0 && len(k.Certificate) == 0 {
		return nil
	}
	key, err := x509.ParseECPrivateKey(k.Key)
	if err != nil {
		return errors.New("networks: the identity has no EC key") // what is wrong with it is secret
	}
	cert, err := k.certificate()
	if err != nil {
		return fmt.Errorf("networks: identity: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return errors.New("networks: the identity's certificate is for another key")
	}
	return nil
}

func (k kept) networks() ([]wpa.Network, error) {
	if len(k.Networks) == 0 {
		return nil, nil
	}
	return wpa.Decode(k.Networks)
}

// union is wpa.Union.
func union(older, newer []byte) ([]wpa.Network, error) {
	a, err := kept{Networks: older}.networks()
	if err != nil {
		return nil, err
	}
	b, err := kept{Networks: newer}.networks()
	if err != nil {
		return nil, err
	}
	return wpa.Union(a, b), nil
}

// readFile reads what writeFile wrote; nil if there is none.
func readFile(path string) (*file, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("networks: %w", err)
	}
	if st.Size() > 2*gate.MaxNetworkState || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("networks: %s has %d bytes and mode %v, want at most %d, for its owner alone", path, st.Size(), st.Mode().Perm(), 2*gate.MaxNetworkState)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("networks: %w", err)
	}
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("networks: %s: %w", path, err)
	}
	return &f, f.check()
}

// writeFile replaces the file as a whole, for its owner alone.
func writeFile(path string, f file) error {
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("networks: %w", err)
	}
	next, err := os.CreateTemp(filepath.Dir(path), ".networks-") // mode 0600
	if err != nil {
		return fmt.Errorf("networks: %w", err)
	}
	_, err = next.Write(data)
	if err = errors.Join(err, next.Close()); err == nil {
		err = os.Rename(next.Name(), path)
	}
	if err != nil {
		os.Remove(next.Name())
		return fmt.Errorf("networks: %w", err)
	}
	return nil
}
