package auditlog

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/url"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// maxKey bounds the text of a key in bytes.
const maxKey = 1 << 10

// Key signs the checkpoints of one log: Ed25519, in a note's form. Its text is
// secret.
type Key struct {
	signer   note.Signer
	verifier note.Verifier
	public   string
}

// LogValue shows nothing of a key.
func (Key) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// NewKey makes the key of a new log and returns its text, which is secret. The
// name of the log, in each of its checkpoints, says whose it is; its random end
// keeps the logs of an organisation's verifiers apart.
func NewKey(verifier, organization string) ([]byte, error) {
	var random [4]byte
	rand.Read(random[:])
	name := strings.Join([]string{escape(verifier), escape(organization), hex.EncodeToString(random[:])}, "/")
	secret, public, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		return nil, fmt.Errorf("key of the audit log: %w", err)
	}
	return []byte(secret + "\n" + public + "\n"), nil
}

// escape makes a name fit for notes: no spaces and no plus sign.
func escape(s string) string { return strings.ReplaceAll(url.PathEscape(s), "+", "%2B") }

// ParseKey reads what NewKey returned.
func ParseKey(data []byte) (k Key, err error) {
	fields := strings.Fields(string(data[:min(len(data), maxKey)]))
	if len(fields) != 2 || len(data) > maxKey {
		return k, fmt.Errorf("key of the audit log: %d bytes with %d words, want the secret and the public key", len(data), len(fields))
	}
	if k.signer, err = note.NewSigner(fields[0]); err != nil {
		return k, fmt.Errorf("key of the audit log: %w", err)
	}
	k.public = fields[1]
	if k.verifier, err = ParsePublicKey(data[len(fields[0]):]); err != nil {
		return k, err
	}
	if k.verifier.Name() != k.signer.Name() || k.verifier.KeyHash() != k.signer.KeyHash() {
		return k, fmt.Errorf("key of the audit log: the public key %s is of another secret key", fields[1])
	}
	return k, nil
}

// ParsePublicKey reads the public key of a log.
func ParsePublicKey(data []byte) (note.Verifier, error) {
	if len(data) > maxKey {
		return nil, fmt.Errorf("public key of the audit log: %d bytes, at most %d", len(data), maxKey)
	}
	v, err := note.NewVerifier(strings.TrimSpace(string(data)))
	if err != nil {
		return nil, fmt.Errorf("public key of the audit log: %w", err)
	}
	return v, nil
}
