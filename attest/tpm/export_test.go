package tpm

import (
	"errors"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"sekisho/attest/seal"
)

// ErrCut is what a TPM answers after the power cut of CutAfter.
var ErrCut = errors.New("power cut")

// cut passes n commands and then none.
type cut struct {
	transport.TPMCloser
	left int
}

func (c *cut) Send(in []byte) ([]byte, error) {
	if c.left == 0 {
		return nil, ErrCut
	}
	c.left--
	return c.TPMCloser.Send(in)
}

// CutAfter cuts the power after n more commands.
func (t *TPM) CutAfter(n int) { t.conn = &cut{t.conn, n} }

// UndefineCounter is what an attacker with the owner hierarchy can do.
func (t *TPM) UndefineCounter() error {
	index, err := t.counterHandle()
	if err != nil {
		return err
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: seal.CounterIndex, Name: index.Name},
	}.Execute(t.conn)
	return err
}

// IncrementPlain increments the counter by password, as its policy forbids.
func (t *TPM) IncrementPlain() error {
	index, err := t.counterHandle()
	if err != nil {
		return err
	}
	_, err = tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    *index,
	}.Execute(t.conn)
	return err
}

// ClearTPM is TPM2_Clear with the empty authorisation.
func (t *TPM) ClearTPM() error {
	_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(t.conn)
	return err
}

// DefineCA puts a CA's certificate where a TPM's maker does.
func (t *TPM) DefineCA(n int, data []byte) error {
	index := nvCAs + tpm2.TPMHandle(n)
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true}}),
	}.Execute(t.conn)
	for at := 0; err == nil && at < len(data); at += 512 {
		var public *tpm2.NVReadPublicResponse
		if public, err = (tpm2.NVReadPublic{NVIndex: index}).Execute(t.conn); err == nil {
			_, err = tpm2.NVWrite{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
				NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
				Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]}, Offset: uint16(at),
			}.Execute(t.conn)
		}
	}
	return err
}
