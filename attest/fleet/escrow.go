package fleet

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/verifier"
)

// maxEscrows bounds what one device may store: a disk that is made anew adds
// one, and none is ever removed by a device.
const maxEscrows = 64

// AdminEscrows and /DEVICE: GET → []seal.Escrow of that device, oldest first.
const AdminEscrows = "/admin/v1/escrows"

// addEscrow stores e durably. What is there stays: a device that did not hear
// our answer sends its volume's again, and nobody exchanges one later.
func (s *Service) addEscrow(ctx context.Context, e *seal.Escrow) error {
	_, err := s.Store.Update(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.device(e.Device)) == "" {
			return attest.Refuse(attest.ReasonDeviceUnknown, "device %s is not enrolled here", e.Device)
		}
		key := s.keys.escrows(e.Device)
		list, _, err := read[[]seal.Escrow](t, key)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list, func(x seal.Escrow) bool { return bytes.Equal(x.Volume, e.Volume) }) {
			return nil
		}
		if len(list) >= maxEscrows {
			return fmt.Errorf("escrow: device %s has %d already; remove those of disks that are gone", e.Device, len(list))
		}
		return write(t, key, append(list, *e))
	})
	return err
}

// EscrowsOf returns the escrows of a device, oldest first. They stay when the
// device is retired: its disk may have to be read.
func (s *Service) EscrowsOf(ctx context.Context, device attest.Digest) ([]seal.Escrow, error) {
	list := []seal.Escrow{}
	err := s.Store.Read(ctx, func(t concurrency.STM) error {
		stored, _, err := read[[]seal.Escrow](t, s.keys.escrows(device))
		list = append([]seal.Escrow{}, stored...)
		return err
	})
	slices.SortStableFunc(list, func(x, y seal.Escrow) int { return x.Created.Compare(y.Created) })
	return list, err
}

// Escrow stores a device's recovery key in escrow. A nil error proves: the
// escrow is durable, and the device that it names signed it with a credential
// of ours that is in force.
func (s *Service) Escrow(ctx context.Context, req attest.EscrowRequest) error {
	if !s.Escrows {
		return attest.Refuse(attest.ReasonRequestMalformed, "this verifier keeps no escrows; set escrow")
	}
	e, err := seal.ParseEscrow(req.Escrow)
	if err != nil {
		return attest.Refuse(attest.ReasonRequestMalformed, "%v", err)
	}
	device, err := s.signedBy(req.Chain, attest.EscrowDigest(req.Escrow), req.Signature)
	if err != nil {
		return err
	}
	if device != e.Device {
		return attest.Refuse(attest.ReasonDeviceMismatch, "escrow of device %s sent by another", e.Device)
	}
	return s.addEscrow(ctx, e)
}

// signedBy returns the device whose credential, of ours and in force, signed
// digest.
func (s *Service) signedBy(chain [][]byte, digest attest.Digest, signature []byte) (device attest.Digest, err error) {
	if len(chain) == 0 || len(chain) > 4 {
		return device, attest.Refuse(attest.ReasonRequestMalformed, "request with %d certificates", len(chain))
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return device, attest.Refuse(attest.ReasonRequestMalformed, "credential: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.Issuer.CA())
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: s.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return device, attest.Refuse(attest.ReasonSignatureInvalid, "credential: %v", err)
	}
	var id string
	if len(leaf.URIs) == 1 {
		id, _ = strings.CutPrefix(leaf.URIs[0].String(), verifier.DevicePrefix)
	}
	if err := device.UnmarshalText([]byte(id)); err != nil || verifier.DeviceURI(device).String() != leaf.URIs[0].String() {
		return device, attest.Refuse(attest.ReasonDeviceMismatch, "credential names no device")
	}
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(key, digest[:], signature) {
		return device, attest.Refuse(attest.ReasonSignatureInvalid, "not signed by the credential's key")
	}
	return device, nil
}

func (a *api) escrow(w http.ResponseWriter, r *http.Request) {
	var req attest.EscrowRequest
	if !a.decode(w, r, &req) {
		return
	}
	err := a.service.Escrow(r.Context(), req)
	if err == nil {
		a.log.Info("recovery key in escrow", "from", r.RemoteAddr)
	}
	a.answer(w, r, "escrow", struct{}{}, err)
}

// escrows lists a device's escrows, oldest first.
func (a *admin) escrows(w http.ResponseWriter, r *http.Request) {
	device, ok := a.id(w, r.PathValue("id"))
	if !ok {
		return
	}
	if !a.Escrows {
		a.fail(w, http.StatusNotFound, errors.New("this verifier keeps no escrows; set escrow"))
		return
	}
	list, err := a.EscrowsOf(r.Context(), device)
	answer(a, w, list, err)
}
