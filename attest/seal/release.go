package seal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"sekisho/attest"
)

// Profile is of Release in JSON.
const Profile = "urn:sekisho:seal:release:2"

// maxRelease bounds ParseRelease's input in bytes.
const maxRelease = 64 << 10

// Release is one release's signed policies. It stands outside of what PCR 11
// measures, and needs no protection of its own: everything in it goes into a
// policy digest that the signatures cover.
type Release struct {
	Profile string                `json:"profile"`
	Image   string                `json:"image"`
	Version string                `json:"version"`
	Epoch   uint64                `json:"epoch"`
	PCRs    map[int]attest.Digest `json:"pcrs"` // when a key may be used
	Key     []byte                `json:"key"`  // release key, SubjectPublicKeyInfo
	// Signatures in ASN.1.
	Disk  []byte `json:"disk"`
	Login []byte `json:"login"`
	Net   []byte `json:"net"`
	Start []byte `json:"rollback_start"` // makes the counter
	Raise []byte `json:"rollback_raise"` // raises it to Epoch
}

// SignPolicy makes the signed policies of the release that refs describes. It
// is the release side's part, with a key that is kept offline. epoch is that
// of the previous release, or one more if no older release may ever open a
// disk again.
func SignPolicy(signer crypto.Signer, refs *attest.ReferenceValues, epoch uint64) (*Release, error) {
	key, err := NewReleaseKey(signer.Public())
	if err != nil {
		return nil, err
	}
	if err := checkEpoch(epoch); err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.key)
	if err != nil {
		return nil, fmt.Errorf("release key: %w", err)
	}
	r := &Release{Profile: Profile, Image: refs.Image, Version: refs.Version, Epoch: epoch, PCRs: make(map[int]attest.Digest), Key: spki}
	for _, i := range PCRs {
		v, ok := refs.PCRs[i]
		if !ok && i != 15 {
			return nil, fmt.Errorf("reference values of %s %s: no value for PCR %d", refs.Image, refs.Version, i)
		}
		r.PCRs[i] = v
	}
	if r.PCRs[15] != (attest.Digest{}) {
		return nil, fmt.Errorf("reference values of %s %s: PCR 15 is not zero; a key must be used before anything extends it", refs.Image, refs.Version)
	}
	for purpose, field := range r.signatures() {
		policy, err := r.policy(key, purpose)
		if err != nil {
			return nil, err
		}
		d := aHash(policy, purpose.ref)
		if *field, err = signer.Sign(rand.Reader, d[:], crypto.SHA256); err != nil {
			return nil, fmt.Errorf("sign policy for %s: %w", purpose.ref, err)
		}
	}
	return r, nil
}

func checkEpoch(epoch uint64) error {
	if epoch < FirstEpoch || epoch > maxEpoch {
		return fmt.Errorf("epoch %d: want %d to %d", epoch, FirstEpoch, maxEpoch)
	}
	return nil
}

// use is one of the five things that a release signs.
type use struct {
	ref   string
	start bool
}

func (r *Release) signatures() map[use]*[]byte {
	return map[use]*[]byte{
		{PurposeDisk, false}: &r.Disk, {PurposeLogin, false}: &r.Login, {PurposeNet, false}: &r.Net,
		{PurposeRollback, true}: &r.Start, {PurposeRollback, false}: &r.Raise,
	}
}

// policy is what the signature for u approves.
func (r *Release) policy(key ReleaseKey, u use) (attest.Digest, error) {
	switch {
	case u.start:
		return startPolicy(), nil
	case u.ref == PurposeRollback:
		return key.raisePolicy(r.Epoch)
	}
	return key.bootPolicy(u.ref, r.PCRs, r.Epoch)
}

// ErrRelease: these are not the signed policies of a release.
var ErrRelease = errors.New("release policy cannot be used")

// ParseRelease reads a Release. A nil error proves: it is signed by key, for
// exactly the PCR values and the epoch that it states.
func ParseRelease(data []byte, key ReleaseKey) (*Release, error) {
	r, own, err := ReadRelease(data)
	if err != nil {
		return nil, err
	}
	if key.key == nil {
		return nil, errNoKey
	}
	if !own.key.Equal(key.key) {
		return nil, errors.New("release policy: signed by another release key than the one that the key was sealed under")
	}
	return r, nil
}

// ReadRelease is ParseRelease with whatever key the release names: it proves
// only that the release is consistent, and returns that key. Errors are
// ErrRelease.
func ReadRelease(data []byte) (*Release, ReleaseKey, error) {
	r, key, err := readRelease(data)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrRelease, err)
	}
	return r, key, err
}

func readRelease(data []byte) (*Release, ReleaseKey, error) {
	if len(data) > maxRelease {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: %d bytes, at most %d: %w", len(data), maxRelease, attest.ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var r Release
	if err := d.Decode(&r); err != nil {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, ReleaseKey{}, errors.New("release policy: data after the document")
	}
	if r.Profile != Profile {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: profile %.64q, want %q", r.Profile, Profile)
	}
	if err := checkEpoch(r.Epoch); err != nil {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: %w", err)
	}
	if len(r.PCRs) != len(PCRs) || r.PCRs[15] != (attest.Digest{}) {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: want values of PCRs %v, that of PCR 15 zero", PCRs)
	}
	public, err := x509.ParsePKIXPublicKey(r.Key)
	if err != nil {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: key: %w", err)
	}
	key, err := NewReleaseKey(public)
	if err != nil {
		return nil, ReleaseKey{}, fmt.Errorf("release policy: %w", err)
	}
	for u, sig := range r.signatures() {
		policy, err := r.policy(key, u)
		if err != nil {
			return nil, ReleaseKey{}, fmt.Errorf("release policy: %w", err)
		}
		if d := aHash(policy, u.ref); !ecdsa.VerifyASN1(key.key, d[:], *sig) {
			return nil, ReleaseKey{}, fmt.Errorf("release policy: signature for %s is not of this key over these PCR values and epoch %d", u.ref, r.Epoch)
		}
	}
	return &r, key, nil
}

// Encode returns r in JSON.
func (r *Release) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("release policy: %w", err)
	}
	return append(data, '\n'), nil
}

// Approved is a policy with the release key's signature over it, as a TPM
// wants it.
type Approved struct {
	Policy    attest.Digest
	Purpose   string        // policyRef
	Digest    attest.Digest // that was signed
	Signature []byte        // ASN.1
}

// Boot returns the boot policy for a purpose.
func (r *Release) Boot(key ReleaseKey, purpose string) (Approved, error) {
	return r.approved(key, use{purpose, false})
}

// Counter returns the policy that starts the rollback counter, or the one that
// raises it.
func (r *Release) Counter(key ReleaseKey, start bool) (Approved, error) {
	return r.approved(key, use{PurposeRollback, start})
}

func (r *Release) approved(key ReleaseKey, u use) (Approved, error) {
	sig, ok := r.signatures()[u]
	if !ok {
		return Approved{}, fmt.Errorf("seal: nothing is sealed for %.64q", u.ref)
	}
	policy, err := r.policy(key, u)
	return Approved{policy, u.ref, aHash(policy, u.ref), bytes.Clone(*sig)}, err
}

// Mismatch says which PCR keeps a key shut.
type Mismatch struct {
	PCR        int
	Want, Seen attest.Digest
}

func (m *Mismatch) Error() string {
	what := map[int]string{
		7:  "Secure Boot is off or its keys are others; switch it on in the firmware setup",
		11: "this is not the image, or not the command line, that was signed",
		15: "a key was used already in this boot; start the laptop again",
	}[m.PCR]
	return fmt.Sprintf("PCR %d is %.16s…, the release was signed for %.16s…: %s", m.PCR, m.Seen, m.Want, what)
}

// ErrRolledBack: the release is older than what this device has run.
var ErrRolledBack = errors.New("release is older than one that this device has run; install the newest release")

// Explain says why a TPM did not open a key: what differs from the release.
// counter is nil where the device has none. nil: nothing that these show.
func (r *Release) Explain(pcrs map[int]attest.Digest, counter *uint64) error {
	var errs []error
	for _, i := range PCRs {
		if seen := pcrs[i]; seen != r.PCRs[i] {
			errs = append(errs, &Mismatch{i, r.PCRs[i], seen})
		}
	}
	switch {
	case counter == nil:
		errs = append(errs, errors.New("this TPM has no rollback counter; it was cleared or never provisioned: use the recovery key"))
	case *counter > r.Epoch:
		errs = append(errs, fmt.Errorf("%w: epoch %d, the counter is %d", ErrRolledBack, r.Epoch, *counter))
	}
	return errors.Join(errs...)
}
