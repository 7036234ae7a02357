package tpm

import (
	"bytes"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
	"sekisho/attest/seal"
)

// ErrStorageKey: the TPM's storage key is not the one that was pinned.
var ErrStorageKey = errors.New("this is not the TPM that the key was sealed to, or it was cleared; use the recovery key")

// ErrUnseal: the TPM refused to unseal.
var ErrUnseal = errors.New("the TPM refuses to unseal")

// storage makes the storage key (TCG TPM v2.0 Provisioning Guidance, section
// 7.5.1: P-256 template) and insists on its name, if one is pinned. Sessions
// are salted to it, so whoever sits on the bus and shows a key of his own is
// found out here, before a secret crosses. t.mu is held.
func (t *TPM) storage(pinned []byte) (loaded, error) {
	key, err := t.primary(tpm2.TPMRHOwner, tpm2.ECCSRKTemplate)
	if err != nil {
		return loaded{}, fmt.Errorf("tpm: storage key: %w", err)
	}
	// The name is computed here from the public area, not believed.
	if pinned != nil && !bytes.Equal(key.public.Name(), pinned) {
		return loaded{}, errors.Join(ErrStorageKey, t.flush(key.handle))
	}
	return key, nil
}

// makeRoom puts the attestation key aside. A TPM need not have more than three
// places for objects (PC Client Platform TPM Profile, section 3.1), our keys
// take two of them and unsealing needs two more; only the kernel's resource
// manager hides that. t.mu is held.
func (t *TPM) makeRoom() (restore func() error, err error) {
	saved, err := tpm2.ContextSave{SaveHandle: t.ak.handle}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("tpm: put the attestation key aside: %w", err)
	}
	if err := t.flush(t.ak.handle); err != nil {
		return nil, err
	}
	return func() error {
		loaded, err := tpm2.ContextLoad{Context: saved.Context}.Execute(t.conn)
		if err != nil {
			return fmt.Errorf("tpm: take the attestation key back: %w", err)
		}
		t.ak.handle = tpm2.TPMHandle(loaded.LoadedHandle.HandleValue())
		return nil
	}, nil
}

// StorageName returns the TPM Name of the storage key, for pinning.
func (t *TPM) StorageName() ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, err := t.storage(nil)
	if err != nil {
		return nil, err
	}
	return key.public.Name(), t.flush(key.handle)
}

// salted is the option of a session whose key only the holder of key can
// compute.
func salted(key loaded) tpm2.AuthOption {
	return tpm2.Salted(key.handle, key.public.area)
}

// encrypted adds to a session that what the TPM answers crosses the bus
// encrypted.
func encrypted() tpm2.AuthOption { return tpm2.AESEncryption(128, tpm2.EncryptOut) }

// Seal puts a secret under what key may open for purpose. pinned is the name
// of the storage key, as it was seen at enrolment; nil pins what is there now.
func (t *TPM) Seal(key seal.ReleaseKey, purpose string, pinned []byte, secret seal.Secret) (out seal.Sealed, err error) {
	fail := func(err error) (seal.Sealed, error) { return seal.Sealed{}, fmt.Errorf("tpm: seal: %w", err) }
	policy, err := key.Authorized(purpose)
	if err != nil {
		return fail(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	restore, err := t.makeRoom()
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, restore()) }()
	parent, err := t.storage(pinned)
	if err != nil {
		return fail(err)
	}
	defer t.flush(parent.handle)
	rsp, err := tpm2.Create{
		ParentHandle: t.underStorage(parent),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret.Reveal()}),
		}},
		InPublic: tpm2.New2B(sealedTemplate(policy)),
	}.Execute(t.conn)
	if err != nil {
		return fail(err)
	}
	return seal.Sealed{Storage: parent.public.Name(), Public: rsp.OutPublic.Bytes(), Private: rsp.OutPrivate.Buffer}, nil
}

// sealedTemplate is a sealed object that policy alone opens.
func sealedTemplate(policy attest.Digest) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy[:]},
	}
}

// Unseal returns what was sealed, if this boot is one that the release signed
// and the rollback counter is not above the release's epoch. It is the TPM
// that decides; where it refuses, the error says what differs: seal.Mismatch,
// seal.ErrRolledBack, ErrStorageKey.
func (t *TPM) Unseal(s seal.Sealed, release *seal.Release, key seal.ReleaseKey, purpose string) (secret seal.Secret, err error) {
	fail := func(err error) (seal.Secret, error) { return seal.Secret{}, fmt.Errorf("tpm: unseal: %w", err) }
	approved, err := release.Boot(key, purpose)
	if err != nil {
		return fail(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	ticket, err := t.ticket(key, approved)
	if err != nil {
		return fail(err)
	}
	restore, err := t.makeRoom()
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, restore()) }()
	parent, err := t.storage(s.Storage)
	if err != nil {
		return fail(err)
	}
	defer t.flush(parent.handle)
	object, err := t.load(parent, s)
	if err != nil {
		return fail(err)
	}
	defer t.flush(object.handle)
	var out []byte
	err = t.withPolicy(key, approved, ticket, t.bootSteps(release, purpose), func(auth tpm2.Session) error {
		rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.handle, Name: object.name, Auth: auth}}.Execute(t.conn)
		if err == nil {
			out = rsp.OutData.Buffer
		}
		return err
	}, salted(parent), encrypted())
	if err != nil {
		return fail(errors.Join(t.explain(release, purpose), fmt.Errorf("%w: %w", ErrUnseal, err)))
	}
	return seal.NewSecret(out), nil
}

// underStorage authorises a command that puts something secret under the
// storage key: it crosses the bus encrypted.
func (t *TPM) underStorage(parent loaded) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: parent.handle, Name: parent.name,
		Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, salted(parent), tpm2.AESEncryption(128, tpm2.EncryptIn))}
}

// load puts an object under the storage key into the TPM.
func (t *TPM) load(parent loaded, s seal.Sealed) (loaded, error) {
	public, err := parse[tpm2.TPMTPublic](s.Public)
	if err != nil {
		return loaded{}, fmt.Errorf("object under the storage key: %w", err)
	}
	object, err := tpm2.Load{
		ParentHandle: t.underStorage(parent),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: s.Private},
		InPublic:     tpm2.New2B(*public),
	}.Execute(t.conn)
	if err != nil {
		return loaded{}, fmt.Errorf("%w: load: %w", ErrUnseal, err)
	}
	return loaded{handle: object.ObjectHandle, name: object.Name}, nil
}

// bootSteps are the commands of a boot policy.
func (t *TPM) bootSteps(release *seal.Release, purpose string) func(tpm2.TPMISHPolicy) error {
	return func(session tpm2.TPMISHPolicy) error {
		pcrs, err := seal.PCRDigestOf(seal.PCRsOf(purpose), release.PCRs)
		if err != nil {
			return err
		}
		if _, err := (tpm2.PolicyPCR{PolicySession: session, PcrDigest: tpm2.TPM2BDigest{Buffer: pcrs[:]}, Pcrs: selection(seal.PCRsOf(purpose))}).Execute(t.conn); err != nil {
			return fmt.Errorf("PCRs: %w", err)
		}
		return t.policyCounter(session, release.Epoch, tpm2.TPMEO(seal.OpUnsignedLE))
	}
}

// explain says what keeps a key for a purpose shut, as far as can be seen. t.mu
// is held.
func (t *TPM) explain(release *seal.Release, purpose string) error {
	pcrs, err := t.readPCRs(seal.PCRsOf(purpose))
	if err != nil {
		return err
	}
	var counter *uint64
	if n, err := t.counter(); err == nil {
		counter = &n
	}
	return release.Explain(pcrs, counter)
}

// withPolicy runs steps in a policy session, has the release key's approval
// put in their place, and calls use with the session.
func (t *TPM) withPolicy(key seal.ReleaseKey, a seal.Approved, ticket *tpm2.TPMTTKVerified, steps func(tpm2.TPMISHPolicy) error, use func(tpm2.Session) error, options ...tpm2.AuthOption) (err error) {
	name, err := key.Name()
	if err != nil {
		return err
	}
	session, end, err := tpm2.PolicySession(t.conn, tpm2.TPMAlgSHA256, 16, options...)
	if err != nil {
		return fmt.Errorf("policy session: %w", err)
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := steps(session.Handle()); err != nil {
		return err
	}
	if _, err := (tpm2.PolicyAuthorize{
		PolicySession:  session.Handle(),
		ApprovedPolicy: tpm2.TPM2BDigest{Buffer: a.Policy[:]},
		PolicyRef:      tpm2.TPM2BDigest{Buffer: []byte(a.Purpose)},
		KeySign:        tpm2.TPM2BName{Buffer: name},
		CheckTicket:    *ticket,
	}).Execute(t.conn); err != nil {
		return fmt.Errorf("release key's approval: %w", err)
	}
	return use(session)
}

// ticket has the TPM verify the release key's signature.
func (t *TPM) ticket(key seal.ReleaseKey, a seal.Approved) (*tpm2.TPMTTKVerified, error) {
	public, err := key.Public()
	if err != nil {
		return nil, err
	}
	area, err := parse[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, fmt.Errorf("release key: %w", err)
	}
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(a.Signature, &sig); err != nil || len(rest) > 0 || sig.R.BitLen() > 256 || sig.S.BitLen() > 256 {
		return nil, fmt.Errorf("release signature of %d bytes is not ECDSA on P-256", len(a.Signature))
	}
	r, s := sig.R.FillBytes(make([]byte, 32)), sig.S.FillBytes(make([]byte, 32))
	k, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*area), Hierarchy: tpm2.TPMRHOwner}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("load the release key: %w", err)
	}
	defer t.flush(k.ObjectHandle)
	v, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name},
		Digest:    tpm2.TPM2BDigest{Buffer: a.Digest[:]},
		Signature: tpm2.TPMTSignature{
			SigAlg: tpm2.TPMAlgECDSA,
			Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
				Hash:       tpm2.TPMAlgSHA256,
				SignatureR: tpm2.TPM2BECCParameter{Buffer: r}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s},
			}),
		},
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("release signature: %w", err)
	}
	return &v.Validation, nil
}

// policyCounter is TPM2_PolicyNV over the whole rollback counter.
func (t *TPM) policyCounter(session tpm2.TPMISHPolicy, epoch uint64, op tpm2.TPMEO) error {
	index, err := t.counterHandle()
	if err != nil {
		return err
	}
	if _, err := (tpm2.PolicyNV{
		AuthHandle:    tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:       *index,
		PolicySession: session,
		OperandB:      tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, epoch)},
		Operation:     op,
	}).Execute(t.conn); err != nil {
		return fmt.Errorf("rollback counter: %w", err)
	}
	return nil
}

// errNoCounter: the rollback counter is not defined.
var errNoCounter = errors.New("no rollback counter")

func (t *TPM) counterHandle() (*tpm2.NamedHandle, error) {
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(seal.CounterIndex)}.Execute(t.conn)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, errNoCounter
	}
	if err != nil {
		return nil, fmt.Errorf("rollback counter: %w", err)
	}
	return &tpm2.NamedHandle{Handle: seal.CounterIndex, Name: public.NVName}, nil
}

// counter reads the rollback counter.
func (t *TPM) counter() (uint64, error) {
	index, err := t.counterHandle()
	if err != nil {
		return 0, err
	}
	rsp, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    *index, Size: 8,
	}.Execute(t.conn)
	if err != nil {
		return 0, fmt.Errorf("rollback counter: %w", err)
	}
	if len(rsp.Data.Buffer) != 8 {
		return 0, fmt.Errorf("rollback counter of %d bytes, want 8", len(rsp.Data.Buffer))
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// Counter returns the rollback counter.
func (t *TPM) Counter() (uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counter()
}

// CreateRollbackCounter makes the rollback counter for a release key; raising
// it to the release's epoch is RaiseRollback's. It may be called again at any
// time: it goes on where it was interrupted, and refuses an index of another
// making, and a release that the counter has passed.
func (t *TPM) CreateRollbackCounter(release *seal.Release, key seal.ReleaseKey) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	fail := func(err error) error { return fmt.Errorf("tpm: make the rollback counter: %w", err) }
	fresh, err := key.CounterPublic(false)
	if err != nil {
		return fail(err)
	}
	written, err := key.CounterPublic(true)
	if err != nil {
		return fail(err)
	}
	index, err := t.counterHandle()
	if errors.Is(err, errNoCounter) {
		area, perr := parse[tpm2.TPMSNVPublic](fresh)
		if perr != nil {
			return fail(perr)
		}
		if _, err := (tpm2.NVDefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			PublicInfo: tpm2.New2B(*area),
		}).Execute(t.conn); err != nil {
			return fail(err)
		}
		index, err = t.counterHandle()
	}
	if err != nil {
		return fail(err)
	}
	switch {
	case bytes.Equal(index.Name.Buffer, name(written)):
	case bytes.Equal(index.Name.Buffer, name(fresh)):
		if err := t.increment(release, key, true); err != nil {
			return fail(err)
		}
	default:
		return fail(fmt.Errorf("NV index 0x%08x is defined already for something else, or for another release key", uint32(seal.CounterIndex)))
	}
	if n, err := t.counter(); err != nil || n > release.Epoch {
		return fail(errors.Join(err, fmt.Errorf("%w: epoch %d, the counter is %d", seal.ErrRolledBack, release.Epoch, n)))
	}
	return nil
}

// RaiseRollback raises the counter to the release's epoch: from then on no
// older release opens anything. Call it when the running slot is marked good
// (seal.RaiseTo), and again if power was lost meanwhile. Each count is one
// command, and others get the TPM between two.
func (t *TPM) RaiseRollback(release *seal.Release, key seal.ReleaseKey) error {
	for {
		done, err := t.raise(release, key)
		if err != nil {
			return fmt.Errorf("tpm: raise the rollback counter: %w", err)
		}
		if done {
			return nil
		}
	}
}

// raise counts one up, if the counter is below the release's epoch.
func (t *TPM) raise(release *seal.Release, key seal.ReleaseKey) (done bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, err := t.counter()
	if err != nil {
		return false, err
	}
	if n > release.Epoch {
		return false, fmt.Errorf("%w: epoch %d, the counter is %d already", seal.ErrRolledBack, release.Epoch, n)
	}
	if n == release.Epoch {
		return true, nil
	}
	return n+1 == release.Epoch, t.increment(release, key, false)
}

// increment counts one up, by the release's approval: of the first count, or
// of any below its epoch.
func (t *TPM) increment(release *seal.Release, key seal.ReleaseKey, first bool) (err error) {
	approved, err := release.Counter(key, first)
	if err != nil {
		return err
	}
	ticket, err := t.ticket(key, approved)
	if err != nil {
		return err
	}
	parent, err := t.storage(nil) // nothing secret crosses
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.flush(parent.handle)) }()
	steps := func(session tpm2.TPMISHPolicy) error {
		if first {
			if _, err := (tpm2.PolicyNVWritten{PolicySession: session, WrittenSet: false}).Execute(t.conn); err != nil {
				return err
			}
		} else if err := t.policyCounter(session, release.Epoch, tpm2.TPMEO(seal.OpUnsignedLT)); err != nil {
			return err
		}
		_, err := tpm2.PolicyCommandCode{PolicySession: session, Code: tpm2.TPMCCNVIncrement}.Execute(t.conn)
		return err
	}
	count := func(auth tpm2.Session) error {
		index, err := t.counterHandle()
		if err != nil {
			return err
		}
		_, err = tpm2.NVIncrement{
			AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: auth},
			NVIndex:    *index,
		}.Execute(t.conn)
		return err
	}
	// Its answer has nothing to encrypt.
	return t.withPolicy(key, approved, ticket, steps, count, salted(parent))
}
