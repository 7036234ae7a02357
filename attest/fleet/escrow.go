package fleet

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/verifier"
)

// maxEscrows bounds what one device may store: a disk that is made anew adds
// one, and none is ever removed by a device.
const maxEscrows = 64

// AdminEscrows and /DEVICE: GET → []seal.Escrow of that device, oldest first.
const AdminEscrows = "/admin/v1/escrows"

// Escrows keeps the devices' recovery keys, which only the organisation's
// escrow key opens, in a directory: DEVICE/VOLUME.json.
type Escrows struct{ dir string }

// NewEscrows keeps escrows in dir, which is made with the first.
func NewEscrows(dir string) *Escrows { return &Escrows{dir} }

// Add stores e durably. What is there stays: a device that did not hear our
// answer sends its volume's again, and nobody exchanges one later.
func (s *Escrows) Add(e *seal.Escrow) error {
	dir := filepath.Join(s.dir, e.Device.String())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("escrow: %w", err)
	}
	there, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("escrow: %w", err)
	}
	name := hex.EncodeToString(e.Volume) + ".json"
	if slices.ContainsFunc(there, func(f os.DirEntry) bool { return f.Name() == name }) {
		return nil
	}
	if len(there) >= maxEscrows {
		return fmt.Errorf("escrow: device %s has %d already; remove those of disks that are gone", e.Device, len(there))
	}
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("escrow: %w", err)
	}
	if err := replace(filepath.Join(dir, name), data); err != nil {
		return fmt.Errorf("escrow: %w", err)
	}
	return nil
}

// Of returns the escrows of a device.
func (s *Escrows) Of(device attest.Digest) ([]seal.Escrow, error) {
	dir := filepath.Join(s.dir, device.String())
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	list := []seal.Escrow{}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		data, err := readFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return nil, fmt.Errorf("escrow: %w", err)
		}
		e, err := seal.ParseEscrow(data)
		if err != nil {
			return nil, err
		}
		list = append(list, *e)
	}
	return list, nil
}

// Escrow stores a device's recovery key in escrow. A nil error proves: the
// escrow is durable, and the device that it names signed it with a credential
// of ours that is in force.
func (s *Service) Escrow(req attest.EscrowRequest) error {
	if s.Escrows == nil {
		return attest.Refuse(attest.ReasonRequestMalformed, "this verifier keeps no escrows; set escrow_dir")
	}
	e, err := seal.ParseEscrow(req.Escrow)
	if err != nil {
		return attest.Refuse(attest.ReasonRequestMalformed, "%v", err)
	}
	if len(req.Chain) == 0 || len(req.Chain) > 4 {
		return attest.Refuse(attest.ReasonRequestMalformed, "escrow with %d certificates", len(req.Chain))
	}
	leaf, err := x509.ParseCertificate(req.Chain[0])
	if err != nil {
		return attest.Refuse(attest.ReasonRequestMalformed, "escrow: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.Issuer.CA())
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: s.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return attest.Refuse(attest.ReasonSignatureInvalid, "escrow: credential: %v", err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != verifier.DeviceURI(e.Device).String() {
		return attest.Refuse(attest.ReasonDeviceMismatch, "escrow of device %s sent by another", e.Device)
	}
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	digest := attest.EscrowDigest(req.Escrow)
	if !ok || !ecdsa.VerifyASN1(key, digest[:], req.Signature) {
		return attest.Refuse(attest.ReasonSignatureInvalid, "escrow: not signed by the credential's key")
	}
	return s.Escrows.Add(e)
}

func (a *api) escrow(w http.ResponseWriter, r *http.Request) {
	var req attest.EscrowRequest
	if !a.decode(w, r, &req) {
		return
	}
	err := a.service.Escrow(req)
	if err == nil {
		a.log.Info("recovery key in escrow", "from", r.RemoteAddr)
	}
	a.answer(w, r, "escrow", struct{}{}, err)
}

// escrows lists a device's escrows, oldest first.
func (a *admin) escrows(w http.ResponseWriter, r *http.Request) {
	var device attest.Digest
	if err := device.UnmarshalText([]byte(r.PathValue("id"))); err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	if a.Escrows == nil {
		a.fail(w, http.StatusNotFound, errors.New("this verifier keeps no escrows; set escrow_dir"))
		return
	}
	list, err := a.Escrows.Of(device)
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	slices.SortStableFunc(list, func(x, y seal.Escrow) int { return x.Created.Compare(y.Created) })
	reply(w, http.StatusOK, list)
}
