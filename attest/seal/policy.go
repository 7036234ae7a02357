// Package seal computes which boots may have a disk key or a logon key, and
// holds the formats that go with it: the release's signed policies, the sealed
// volume, the recovery key and its escrow. It drives no TPM (attest/tpm does)
// and does no I/O.
//
// A key is sealed under PolicyAuthorize(release key, purpose): any boot policy
// that the release key has signed opens it, so that an update needs no
// re-sealing. A boot policy is
//
//	PolicyPCR(7, 11, 15 = 0) AND PolicyNV(rollback counter ≤ epoch of the release)
//
// and for logon keys and the network's the same without PCR 15.
//
// PolicyAuthorize alone would accept every image that was ever signed. The
// counter ends that: the host raises it to the epoch of the running release
// once that release's slot is marked good.
//
// Section numbers are of the TCG TPM 2.0 Library, revision 1.59, Part 3.
package seal

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"sekisho/attest"
)

// Purposes are the policyRef of what may be sealed: a signature for one opens
// nothing of another.
const (
	PurposeDisk     = "sekisho/disk/1"
	PurposeLogin    = "sekisho/login/1"
	PurposeNet      = "sekisho/net/1"      // what the laptop needs to reach the verifier
	PurposeRollback = "sekisho/rollback/1" // of the counter's own write policy
)

// PCRs that a boot policy covers: Secure Boot, the image, and what init
// extends after a key was used. The firmware's own PCRs are for the verifier
// to judge: a BIOS update must not cost anyone the disk.
var PCRs = [...]int{7, 11, 15}

// LoginPCRs are those of a logon key, and of what a network asks for: they are
// used all day, also after the disk's key was used, which PCR 15 shows.
var LoginPCRs = [...]int{7, 11}

// PCRsOf lists the PCRs that the boot policy of a purpose covers.
func PCRsOf(purpose string) []int {
	if purpose == PurposeLogin || purpose == PurposeNet {
		return LoginPCRs[:]
	}
	return PCRs[:]
}

// Rollback counter. It is a TPM counter and not a number in NV, because a
// counter that is undefined and defined again starts no lower than it ended
// (Part 1, section 37.2.5): whoever holds the owner hierarchy cannot lower it.
const (
	CounterIndex = 0x01805345 // in the owner's range (TCG Registry of Reserved TPM 2.0 Handles, section 2.2.2)
	// FirstEpoch is the epoch of the first release. A new TPM's counter starts
	// a little above zero, by what other counters it has had.
	FirstEpoch = 16
	// maxEpoch keeps counting up within what an NV memory bears.
	maxEpoch = FirstEpoch + 1<<12
)

// Command codes (Part 2, section 6.5.2).
const (
	ccNVIncrement       = 0x00000134
	ccPolicyNV          = 0x00000149
	ccPolicyAuthorize   = 0x0000016a
	ccPolicyCommandCode = 0x0000016c
	ccPolicyPCR         = 0x0000017f
	ccPolicyNVWritten   = 0x0000018f
)

const (
	algSHA256 = 0x000b
	algECC    = 0x0023
	algNull   = 0x0010
	curveP256 = 0x0003
)

// Comparisons of PolicyNV: the counter on the left (Part 2, section 6.8).
const (
	OpUnsignedLT uint16 = 0x0005
	OpUnsignedLE uint16 = 0x0009
)

// Attributes of the counter (Part 2, section 13.4): written by policy alone,
// read by anyone, outside the dictionary attack lockout.
const (
	CounterAttributes = attrPolicyWrite | attrCounter | attrAuthRead | attrNoDA
	attrPolicyWrite   = 1 << 3
	attrCounter       = 1 << 4
	attrAuthRead      = 1 << 18
	attrNoDA          = 1 << 25
	attrWritten       = 1 << 29
)

var be = binary.BigEndian

// extend is how a policy command updates a policy digest (Part 1, section
// 19.7): H(old ‖ command code ‖ arguments).
func extend(old attest.Digest, cc uint32, args ...[]byte) attest.Digest {
	b := be.AppendUint32(old[:len(old):len(old)], cc)
	for _, a := range args {
		b = append(b, a...)
	}
	return sha256.Sum256(b)
}

// ReleaseKey is the public key that signs boot policies.
type ReleaseKey struct{ key *ecdsa.PublicKey }

// NewReleaseKey checks that key is one that a TPM can use: P-256.
func NewReleaseKey(key any) (ReleaseKey, error) {
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() {
		return ReleaseKey{}, fmt.Errorf("release key of type %T: want ECDSA on P-256", key)
	}
	return ReleaseKey{k}, nil
}

// Public is the key as TPMT_PUBLIC for TPM2_LoadExternal: a signing key
// without a scheme of its own, authorised by nobody.
func (k ReleaseKey) Public() ([]byte, error) {
	raw, err := k.key.Bytes()
	if err != nil {
		return nil, fmt.Errorf("release key: %w", err)
	}
	const userWithAuth, signEncrypt = 1 << 6, 1 << 18
	b := be.AppendUint16(nil, algECC)
	b = be.AppendUint16(b, algSHA256)
	b = be.AppendUint32(b, userWithAuth|signEncrypt)
	b = be.AppendUint16(b, 0)       // no policy
	b = be.AppendUint16(b, algNull) // no symmetric algorithm
	b = be.AppendUint16(b, algNull) // no scheme
	b = be.AppendUint16(b, curveP256)
	b = be.AppendUint16(b, algNull) // no key derivation
	return sized(sized(b, raw[1:33]), raw[33:]), nil
}

func sized(b, field []byte) []byte {
	return append(be.AppendUint16(b, uint16(len(field))), field...)
}

// Name is the TPM Name of the key (Part 1, section 16).
func (k ReleaseKey) Name() ([]byte, error) {
	public, err := k.Public()
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(public)
	return append(be.AppendUint16(nil, algSHA256), h[:]...), nil
}

// Authorized is the policy of what the release key may open for a purpose:
// TPM2_PolicyAuthorize (section 23.16), which starts from zero and adds the
// policyRef in a second step.
func (k ReleaseKey) Authorized(purpose string) (attest.Digest, error) {
	name, err := k.Name()
	if err != nil {
		return attest.Digest{}, err
	}
	d := extend(attest.Digest{}, ccPolicyAuthorize, name)
	return sha256.Sum256(append(d[:], purpose...)), nil
}

// CounterPublic is the rollback counter's TPMS_NV_PUBLIC (Part 2, section
// 13.5). It depends on the release key alone, so one signature fits the
// counters of all laptops of a fleet.
func (k ReleaseKey) CounterPublic(written bool) ([]byte, error) {
	policy, err := k.Authorized(PurposeRollback)
	if err != nil {
		return nil, err
	}
	attrs := uint32(CounterAttributes)
	if written {
		attrs |= attrWritten
	}
	b := be.AppendUint32(nil, CounterIndex)
	b = be.AppendUint16(b, algSHA256)
	b = be.AppendUint32(b, attrs)
	return be.AppendUint16(sized(b, policy[:]), 8), nil
}

// counterName is the TPM Name of the counter once it was written.
func (k ReleaseKey) counterName() ([]byte, error) {
	public, err := k.CounterPublic(true)
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(public)
	return append(be.AppendUint16(nil, algSHA256), h[:]...), nil
}

// PCRDigest is the digest that PolicyPCR compares: of the values in the order
// of PCRs.
func PCRDigest(pcrs map[int]attest.Digest) (attest.Digest, error) {
	return PCRDigestOf(PCRs[:], pcrs)
}

// PCRDigestOf is PCRDigest for some PCRs, which are in rising order.
func PCRDigestOf(which []int, pcrs map[int]attest.Digest) (attest.Digest, error) {
	h := sha256.New()
	for _, i := range which {
		v, ok := pcrs[i]
		if !ok {
			return attest.Digest{}, fmt.Errorf("seal: no value of PCR %d", i)
		}
		h.Write(v[:])
	}
	return attest.Digest(h.Sum(nil)), nil
}

// policyPCR is TPM2_PolicyPCR (section 23.7).
func policyPCR(old attest.Digest, which []int, pcrs map[int]attest.Digest) (attest.Digest, error) {
	digest, err := PCRDigestOf(which, pcrs)
	if err != nil {
		return attest.Digest{}, err
	}
	mask := make([]byte, 3)
	for _, i := range which {
		mask[i/8] |= 1 << (i % 8)
	}
	sel := be.AppendUint32(nil, 1) // one bank
	sel = be.AppendUint16(sel, algSHA256)
	sel = append(append(sel, byte(len(mask))), mask...)
	return extend(old, ccPolicyPCR, sel, digest[:]), nil
}

// policyNV is TPM2_PolicyNV over the whole counter (section 23.9).
func policyNV(old attest.Digest, epoch uint64, op uint16, name []byte) attest.Digest {
	args := be.AppendUint64(nil, epoch)
	args = be.AppendUint16(args, 0) // offset
	args = be.AppendUint16(args, op)
	h := sha256.Sum256(args)
	return extend(old, ccPolicyNV, h[:], name)
}

// bootPolicy is the policy of one boot: these PCR values, and a counter that
// is not above epoch.
func (k ReleaseKey) bootPolicy(purpose string, pcrs map[int]attest.Digest, epoch uint64) (attest.Digest, error) {
	name, err := k.counterName()
	if err != nil {
		return attest.Digest{}, err
	}
	d, err := policyPCR(attest.Digest{}, PCRsOf(purpose), pcrs)
	if err != nil {
		return attest.Digest{}, err
	}
	return policyNV(d, epoch, OpUnsignedLE, name), nil
}

// startPolicy lets a counter that was never written be incremented once
// (sections 23.20 and 23.11).
func startPolicy() attest.Digest {
	d := extend(attest.Digest{}, ccPolicyNVWritten, []byte{0})
	return extend(d, ccPolicyCommandCode, be.AppendUint32(nil, ccNVIncrement))
}

// raisePolicy lets the counter be incremented while it is below epoch.
func (k ReleaseKey) raisePolicy(epoch uint64) (attest.Digest, error) {
	name, err := k.counterName()
	if err != nil {
		return attest.Digest{}, err
	}
	d := policyNV(attest.Digest{}, epoch, OpUnsignedLT, name)
	return extend(d, ccPolicyCommandCode, be.AppendUint32(nil, ccNVIncrement)), nil
}

// aHash is what the release key signs for a policy (TPM2_PolicyAuthorize,
// section 23.16.1).
func aHash(policy attest.Digest, purpose string) attest.Digest {
	return sha256.Sum256(append(policy[:], purpose...))
}

// errNoKey is returned for the zero ReleaseKey.
var errNoKey = errors.New("seal: no release key")

// Slot is one of the two places for an image.
type Slot struct {
	Epoch uint64 // of its release
	Good  bool   // it has booted and was marked good
}

// RaiseTo says to what the rollback counter may be raised: to the epoch of the
// running slot once that is good, and before that not at all, because a slot
// that turns out bad must leave the other one able to unseal.
func RaiseTo(running Slot, counter uint64) (epoch uint64, raise bool) {
	if !running.Good || running.Epoch <= counter {
		return 0, false
	}
	return running.Epoch, true
}
