package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"github.com/fxamacker/cbor/v2"

	"sekisho/attest"
)

// volumeProfile is of Volume.
const volumeProfile = "urn:sekisho:seal:volume:1"

// Limits of a Volume in bytes.
const (
	maxVolume = 8 << 10
	maxBlob   = 1 << 10 // TPM2B_PUBLIC and TPM2B_PRIVATE of a sealed object
	// SecretSize is what is sealed.
	SecretSize = 32
)

// Secret is a key. Printing or logging one shows nothing of it.
type Secret struct{ b []byte }

// NewSecret wraps the bytes of a key.
func NewSecret(b []byte) Secret { return Secret{b} }

// Reveal returns the bytes of the key, for the one who uses it.
func (s Secret) Reveal() []byte { return s.b }

// Wipe overwrites the key.
func (s Secret) Wipe() { clear(s.b) }

func (s Secret) String() string { return "[secret]" }

// GoString implements fmt.GoStringer.
func (s Secret) GoString() string { return s.String() }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON implements json.Marshaler.
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// Sealed is a TPM's sealed object.
type Sealed struct {
	Storage []byte `cbor:"1,keyasint"` // TPM Name of the storage key above it
	Public  []byte `cbor:"2,keyasint"` // TPMT_PUBLIC
	Private []byte `cbor:"3,keyasint"` // TPM2B_PRIVATE without its size
}

// Volume is what stands on the disk, in the clear, beside an encrypted volume.
// The sealed secret is not the volume's key: that is derived from it only
// after the header of the volume was found to be the one that was there when
// the volume was made. Whoever exchanges the header, for one with a cipher
// that hides nothing or with a key of his own, gets no key.
type Volume struct {
	Profile  string `cbor:"1,keyasint"`
	Purpose  string `cbor:"2,keyasint"`
	ID       []byte `cbor:"3,keyasint"` // 16 bytes, random
	Sealed   Sealed `cbor:"4,keyasint"`
	Header   []byte `cbor:"5,keyasint"` // HMAC of purpose, ID and SHA-256 of the header
	Recovery []byte `cbor:"6,keyasint"` // the secret once more, under the recovery key
}

// Unbound is a volume in the making: it has a key, with which its header is
// made, and it is nothing until Bind ties it to that header.
type Unbound struct {
	Key      Secret
	Recovery Recovery // to be shown once and kept nowhere
	volume   *Volume
	secret   Secret
}

// Make makes a secret, has sealTo put it into the TPM, and returns the volume
// to be made with it.
func Make(purpose string, sealTo func(Secret) (Sealed, error)) (*Unbound, error) {
	fail := func(err error) (*Unbound, error) { return nil, fmt.Errorf("new volume: %w", err) }
	if purpose != PurposeDisk && purpose != PurposeLogin {
		return fail(fmt.Errorf("nothing is sealed for %.64q", purpose))
	}
	u := &Unbound{secret: Secret{make([]byte, SecretSize)}, Recovery: NewRecovery(),
		volume: &Volume{Profile: volumeProfile, Purpose: purpose, ID: make([]byte, 16)}}
	rand.Read(u.secret.b)
	rand.Read(u.volume.ID)
	var err error
	if u.volume.Sealed, err = sealTo(u.secret); err != nil {
		return fail(err)
	}
	if u.volume.Recovery, err = u.volume.wrap(u.Recovery, u.secret); err != nil {
		return fail(err)
	}
	if u.Key, err = u.volume.key(u.secret); err != nil {
		return fail(err)
	}
	return u, nil
}

// ID names the volume, for the escrow of its recovery key.
func (u *Unbound) ID() []byte { return u.volume.ID }

// Lockout is the authorisation of the lock-out hierarchy of a TPM that the
// volume is sealed to: who has the recovery key has it too.
func (u *Unbound) Lockout() ([]byte, error) { return u.volume.derive(u.secret.b, "lockout") }

// Bind returns the volume for the header with this SHA-256.
func (u *Unbound) Bind(header attest.Digest) (*Volume, error) {
	v := *u.volume
	var err error
	v.Header, err = v.tag(u.secret, header)
	return &v, err
}

// Wipe overwrites the secrets.
func (u *Unbound) Wipe() {
	u.Key.Wipe()
	u.secret.Wipe()
	u.Recovery.secret.Wipe()
}

// NewVolume is Make and Bind in one, for a header that is there already.
func NewVolume(purpose string, header attest.Digest, sealTo func(Secret) (Sealed, error)) (*Volume, Secret, Recovery, error) {
	u, err := Make(purpose, sealTo)
	if err != nil {
		return nil, Secret{}, Recovery{}, err
	}
	v, err := u.Bind(header)
	return v, u.Key, u.Recovery, err
}

// ErrHeader: the volume's header is not the one that the key belongs to.
var ErrHeader = errors.New("the disk's header is not the one that this key was made for: the disk was exchanged or its header changed; do not use this disk, or make a new volume")

// Open returns the volume's key for the sealed secret, if header is the
// SHA-256 of the header that the volume was made with. It wipes secret.
func (v *Volume) Open(secret Secret, header attest.Digest) (Secret, error) {
	defer secret.Wipe()
	if len(secret.b) != SecretSize {
		return Secret{}, fmt.Errorf("volume: secret of %d bytes, want %d", len(secret.b), SecretSize)
	}
	want, err := v.tag(secret, header)
	if err != nil {
		return Secret{}, err
	}
	if !hmac.Equal(want, v.Header) {
		return Secret{}, ErrHeader
	}
	return v.key(secret)
}

// OpenRecovery is Open with the recovery key instead of the TPM. It also
// returns the secret, to be sealed anew.
func (v *Volume) OpenRecovery(r Recovery, header attest.Digest) (key, secret Secret, err error) {
	aead, err := v.recoveryCipher(r)
	if err != nil {
		return Secret{}, Secret{}, err
	}
	if len(v.Recovery) < aead.NonceSize() {
		return Secret{}, Secret{}, errors.New("volume: no recovery copy")
	}
	plain, err := aead.Open(nil, v.Recovery[:aead.NonceSize()], v.Recovery[aead.NonceSize():], v.context())
	if err != nil {
		return Secret{}, Secret{}, fmt.Errorf("volume: %w: it belongs to another volume", ErrRecovery)
	}
	secret = Secret{bytes.Clone(plain)}
	if key, err = v.Open(Secret{plain}, header); err != nil {
		secret.Wipe()
		return Secret{}, Secret{}, err
	}
	return key, secret, nil
}

// Measurement is what PCR 15 is extended with once the key was used:
// HMAC(volume key, device id). It tells nothing of the key and shows another
// value for another volume.
func Measurement(key Secret, device attest.Digest) attest.Digest {
	h := hmac.New(sha256.New, key.b)
	h.Write([]byte("sekisho/volume/1"))
	h.Write(device[:])
	return attest.Digest(h.Sum(nil))
}

// context binds what is derived or wrapped to this volume.
func (v *Volume) context() []byte {
	return append(sized(nil, []byte(v.Purpose)), v.ID...)
}

func (v *Volume) derive(secret []byte, label string) ([]byte, error) {
	return hkdf.Key(sha256.New, secret, v.context(), "sekisho/volume/1 "+label, 32)
}

func (v *Volume) key(secret Secret) (Secret, error) {
	b, err := v.derive(secret.b, "key")
	return Secret{b}, err
}

func (v *Volume) tag(secret Secret, header attest.Digest) ([]byte, error) {
	k, err := v.derive(secret.b, "header")
	if err != nil {
		return nil, err
	}
	h := hmac.New(sha256.New, k)
	h.Write(v.context())
	h.Write(header[:])
	return h.Sum(nil), nil
}

func (v *Volume) recoveryCipher(r Recovery) (cipher.AEAD, error) {
	k, err := v.derive(r.secret.b, "recovery")
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (v *Volume) wrap(r Recovery, secret Secret) ([]byte, error) {
	aead, err := v.recoveryCipher(r)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	return aead.Seal(nonce, nonce, secret.b, v.context()), nil
}

// codec is core deterministic CBOR (RFC 8949, section 4.2.1), nothing optional.
func codec() (cbor.EncMode, cbor.DecMode, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, nil, err
	}
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16,
	}.DecMode()
	return enc, dec, err
}

// Encode returns v in deterministic CBOR.
func (v *Volume) Encode() ([]byte, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	enc, _, err := codec()
	if err != nil {
		return nil, fmt.Errorf("volume: %w", err)
	}
	return enc.Marshal(v)
}

// ParseVolume reads a Volume. Nothing in it is to be believed: the TPM and the
// header's tag decide.
func ParseVolume(data []byte) (*Volume, error) {
	if len(data) > maxVolume {
		return nil, fmt.Errorf("volume: %d bytes, at most %d: %w", len(data), maxVolume, attest.ErrTooLarge)
	}
	_, dec, err := codec()
	if err != nil {
		return nil, fmt.Errorf("volume: %w", err)
	}
	var v Volume
	if err := dec.Unmarshal(data, &v); err != nil {
		return nil, fmt.Errorf("volume: %w", err)
	}
	return &v, v.check()
}

func (v *Volume) check() error {
	switch {
	case v.Profile != volumeProfile:
		return fmt.Errorf("volume: profile %.64q, want %q", v.Profile, volumeProfile)
	case v.Purpose != PurposeDisk && v.Purpose != PurposeLogin:
		return fmt.Errorf("volume: purpose %.64q is not known", v.Purpose)
	case len(v.ID) != 16 || len(v.Header) != sha256.Size || len(v.Recovery) > 128:
		return fmt.Errorf("volume: id of %d, tag of %d, recovery copy of %d bytes", len(v.ID), len(v.Header), len(v.Recovery))
	case len(v.Sealed.Storage) != 2+sha256.Size || len(v.Sealed.Public) > maxBlob || len(v.Sealed.Private) > maxBlob:
		return fmt.Errorf("volume: sealed object of %d, %d and %d bytes", len(v.Sealed.Storage), len(v.Sealed.Public), len(v.Sealed.Private))
	}
	return nil
}
