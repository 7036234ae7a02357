// Package tpm is the only code of this project that knows TPM 2.0: it drives
// the device, and it holds the pure functions over TPM structures that a
// verifier needs. Section numbers are of the TCG TPM 2.0 Library, revision
// 1.59, unless another document is named.
package tpm

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"sekisho/attest"
)

// NV indices of the EK certificates and of the CAs that lead to them (TCG EK
// Credential Profile 2.5, section 2.2.1.4; TPM 2.0 Provisioning Guidance,
// section 2.2.1.5.2). Intel's TPMs since the 11th generation have CAs of one
// chip each there, one behind the other.
const (
	nvCertRSA  tpm2.TPMHandle = 0x01c00002 // template L-1, RSA 2048
	nvCertECC  tpm2.TPMHandle = 0x01c0000a // template L-2, P-256
	nvCAs      tpm2.TPMHandle = 0x01c00100 // the first of them
	nvCAsAfter tpm2.TPMHandle = 0x01c00200
)

// Bounds in bytes: of one index, and of the EK certificate with its CAs.
const (
	maxCertificate = 4 << 10
	maxChain       = 16 << 10
)

// ErrNoTPM is returned by Open where there is no TPM to open.
var ErrNoTPM = errors.New("no TPM")

// Identity is what a TPM shows of itself. The keys are TPMT_PUBLIC.
type Identity struct {
	EKCertificate []byte // DER as it stands in NV, CAs behind it; empty when there is none
	EK            []byte // endorsement key, of the TPM's maker
	AK            []byte // attestation key, the same at every start
	Key           []byte // credential key, another one at each start
}

// Proof is one attestation.
type Proof struct {
	Quote, QuoteSig     []byte // TPM2_Quote over attest.QuotedPCRs by the AK
	PCRs                map[int]attest.Digest
	Certify, CertifySig []byte // TPM2_Certify of the credential key by the AK
}

// TPM is an open TPM with its attestation key and this start's credential key
// loaded. It is safe for concurrent use.
type TPM struct {
	mu    sync.Mutex
	conn  transport.TPMCloser
	ak    loaded
	key   loaded
	ident Identity
	ek    tpm2.TPMTPublic // template that has the certificate
}

// loaded is a key in the TPM.
type loaded struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public *Public
}

func (l loaded) named() tpm2.NamedHandle { return tpm2.NamedHandle{Handle: l.handle, Name: l.name} }

// Open opens the TPM at path, a character device such as /dev/tpmrm0 or the
// unix socket of an emulator, and makes its keys. ErrNoTPM: nothing is there.
func Open(path string) (*TPM, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w at %s: %w", ErrNoTPM, path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	open := linuxtpm.Open
	if info.Mode()&os.ModeSocket != 0 {
		open = linuxudstpm.Open
	}
	conn, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("tpm: open %s: %w", path, err)
	}
	t := &TPM{conn: conn}
	if err := t.start(); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *TPM) start() error {
	if err := t.findEK(); err != nil {
		return err
	}
	var err error
	if t.ak, err = t.primary(tpm2.TPMRHEndorsement, akTemplate()); err != nil {
		return fmt.Errorf("tpm: attestation key: %w", err)
	}
	t.ident.AK = t.ak.public.Bytes
	var unique [32]byte
	rand.Read(unique[:])
	if t.key, err = t.primary(tpm2.TPMRHOwner, credentialTemplate(unique)); err != nil {
		return fmt.Errorf("tpm: credential key: %w", err)
	}
	t.ident.Key = t.key.public.Bytes
	return nil
}

// findEK settles on the endorsement key: the P-256 one if it has a
// certificate, else the RSA one if that has, else P-256 without certificate.
func (t *TPM) findEK() error {
	t.ek = tpm2.ECCEKTemplate
	for _, c := range []struct {
		index    tpm2.TPMHandle
		template tpm2.TPMTPublic
	}{{nvCertECC, tpm2.ECCEKTemplate}, {nvCertRSA, tpm2.RSAEKTemplate}} {
		cert, err := t.readNV(c.index)
		if err != nil {
			return fmt.Errorf("tpm: EK certificate at 0x%08x: %w", uint32(c.index), err)
		}
		if len(cert) > 0 {
			t.ek, t.ident.EKCertificate = c.template, append(cert, t.readCAs(maxChain-len(cert))...)
			break
		}
	}
	ek, err := t.primary(tpm2.TPMRHEndorsement, t.ek)
	if err != nil {
		return fmt.Errorf("tpm: endorsement key: %w", err)
	}
	t.ident.EK = ek.public.Bytes
	return t.flush(ek.handle)
}

// Close unloads the keys and closes the device.
func (t *TPM) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, l := range []loaded{t.ak, t.key} {
		if l.public != nil {
			errs = append(errs, t.flush(l.handle))
		}
	}
	t.ak, t.key = loaded{}, loaded{}
	return errors.Join(append(errs, t.conn.Close())...)
}

// Identity returns the public keys and the EK certificate.
func (t *TPM) Identity() Identity { return t.ident }

// Activate unwraps a credential made by MakeCredential for our endorsement and
// attestation keys (TPM2_ActivateCredential, Part 3, section 12.5). The secret
// crosses the bus encrypted: the session is salted to the endorsement key.
func (t *TPM) Activate(blob, encSecret []byte) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ek, err := t.primary(tpm2.TPMRHEndorsement, t.ek)
	if err != nil {
		return nil, fmt.Errorf("tpm: endorsement key: %w", err)
	}
	defer t.flush(ek.handle)
	policy := func(c transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			PolicySession: session,
			NonceTPM:      nonce,
		}.Execute(c)
		return err
	}
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: t.ak.handle, Name: t.ak.name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, policy,
			tpm2.Salted(ek.handle, ek.public.area), tpm2.AESEncryption(128, tpm2.EncryptOut))},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: encSecret},
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("tpm: activate credential: %w", err)
	}
	return rsp.CertInfo.Buffer, nil
}

// Attest quotes attest.QuotedPCRs and certifies the credential key, both bound
// to extra, and reads the PCR values that the quote covers.
func (t *TPM) Attest(extra attest.Digest) (*Proof, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	certify, certifySig, err := t.certify(t.key, extra[:])
	if err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	// A PCR may be extended between reading and quoting: read around the quote
	// until the values fit.
	for range 4 {
		quoted, err := tpm2.Quote{
			SignHandle:     t.ak.named(),
			QualifyingData: tpm2.TPM2BData{Buffer: extra[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      selection(attest.QuotedPCRs[:]),
		}.Execute(t.conn)
		if err != nil {
			return nil, fmt.Errorf("tpm: quote: %w", err)
		}
		pcrs, err := t.readPCRs(attest.QuotedPCRs[:])
		if err != nil {
			return nil, err
		}
		statement, err := ParseStatement(quoted.Quoted.Bytes())
		if err != nil {
			return nil, fmt.Errorf("tpm: quote: %w", err)
		}
		want, err := PCRDigest(pcrs)
		if err != nil {
			return nil, fmt.Errorf("tpm: quote: %w", err)
		}
		if string(want[:]) == string(statement.PCRDigest) {
			return &Proof{
				Quote: quoted.Quoted.Bytes(), QuoteSig: tpm2.Marshal(quoted.Signature),
				PCRs:    pcrs,
				Certify: certify, CertifySig: certifySig,
			}, nil
		}
	}
	return nil, errors.New("tpm: quote: the PCRs kept changing while they were read; try again")
}

// Extend extends a PCR, SHA-256 bank, with digest.
func (t *TPM) Extend(pcr int, digest attest.Digest) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
			{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]},
		}},
	}.Execute(t.conn)
	if err != nil {
		return fmt.Errorf("tpm: extend PCR %d: %w", pcr, err)
	}
	return nil
}

// ReadPCRs reads PCRs of the SHA-256 bank, given in rising order.
func (t *TPM) ReadPCRs(want []int) (map[int]attest.Digest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.readPCRs(want)
}

// readPCRs reads PCRs of the SHA-256 bank; a TPM gives at most eight at a time
// (TPML_DIGEST).
func (t *TPM) readPCRs(want []int) (map[int]attest.Digest, error) {
	values := make(map[int]attest.Digest, len(want))
	for len(want) > 0 {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(want)}.Execute(t.conn)
		if err != nil {
			return nil, fmt.Errorf("tpm: read PCRs: %w", err)
		}
		sel := rsp.PCRSelectionOut.PCRSelections
		if len(sel) != 1 || len(rsp.PCRValues.Digests) == 0 {
			return nil, errors.New("tpm: read PCRs: no value; the SHA-256 bank is not active")
		}
		got := bits(sel[0].PCRSelect)
		if len(got) != len(rsp.PCRValues.Digests) || len(got) > len(want) {
			return nil, fmt.Errorf("tpm: read PCRs: %d values for %d PCRs", len(rsp.PCRValues.Digests), len(got))
		}
		for i, pcr := range got {
			d := rsp.PCRValues.Digests[i].Buffer
			if len(d) != len(attest.Digest{}) || pcr != want[i] {
				return nil, fmt.Errorf("tpm: read PCRs: PCR %d with %d bytes, want PCR %d", pcr, len(d), want[i])
			}
			values[pcr] = attest.Digest(d)
		}
		want = want[len(got):]
	}
	return values, nil
}

func selection(pcrs []int) tpm2.TPMLPCRSelection {
	list := make([]uint, len(pcrs))
	for i, p := range pcrs {
		list[i] = uint(p)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(list...)},
	}}
}

func (t *TPM) primary(hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic) (loaded, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t.conn)
	if err != nil {
		return loaded{}, err
	}
	public, err := ParsePublic(rsp.OutPublic.Bytes())
	if err != nil {
		return loaded{}, errors.Join(err, t.flush(rsp.ObjectHandle))
	}
	return loaded{rsp.ObjectHandle, rsp.Name, public}, nil
}

func (t *TPM) flush(h tpm2.TPMHandle) error {
	if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(t.conn); err != nil {
		return fmt.Errorf("tpm: flush 0x%08x: %w", uint32(h), err)
	}
	return nil
}

// readCAs returns the certificates of the CAs in NV, at most limit bytes. That
// they cannot be read is no fault of the TPM's: then the EK certificate has to
// do without.
func (t *TPM) readCAs(limit int) (list []byte) {
	for index := nvCAs; index < nvCAsAfter; index++ {
		data, err := t.readNV(index)
		if err != nil || len(data) == 0 || len(list)+len(data) > limit {
			break
		}
		list = append(list, data...)
	}
	return list
}

// readNV returns the content of an NV index, nothing if it is not defined.
func (t *TPM) readNV(index tpm2.TPMHandle) ([]byte, error) {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t.conn)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	area, err := public.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	if area.DataSize > maxCertificate {
		return nil, fmt.Errorf("%d bytes, at most %d", area.DataSize, maxCertificate)
	}
	const chunk = 512 // every TPM's TPM_PT_NV_BUFFER_MAX is at least this
	var data []byte
	for len(data) < int(area.DataSize) {
		rsp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
			Size:       min(chunk, area.DataSize-uint16(len(data))),
			Offset:     uint16(len(data)),
		}.Execute(t.conn)
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, errors.New("empty read")
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return data, nil
}
