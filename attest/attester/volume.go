package attester

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// keyTime bounds the answer to a request about a volume or to logind.
const keyTime = 2 * time.Minute

// Sealer makes what Unsealer opens; *tpm.TPM has it.
type Sealer interface {
	CreateRollbackCounter(r *seal.Release, key seal.ReleaseKey) error
	StorageName() ([]byte, error)
	Seal(key seal.ReleaseKey, purpose string, pinned []byte, secret seal.Secret) (seal.Sealed, error)
	OwnLockout(auth []byte) (set bool, err error)
}

// volumeSealer returns the open TPM, with the rollback counter that goes with
// the release of the running image, and what seals for a purpose under it.
func (a *Attester) volumeSealer(release []byte) (Sealer, func(purpose string, secret seal.Secret) (seal.Sealed, error), error) {
	r, signer, err := seal.ReadRelease(release)
	if err != nil {
		return nil, nil, err
	}
	if err := a.openTPM(); err != nil {
		return nil, nil, err
	}
	a.mu.Lock()
	s, ok := a.hw.(Sealer)
	a.mu.Unlock()
	if !ok {
		return nil, nil, errors.New("volume: the TPM was closed, or cannot seal; try again")
	}
	if err := s.CreateRollbackCounter(r, signer); err != nil {
		return nil, nil, err
	}
	pinned, err := s.StorageName()
	if err != nil {
		return nil, nil, err
	}
	return s, func(purpose string, secret seal.Secret) (seal.Sealed, error) {
		return s.Seal(signer, purpose, pinned, secret)
	}, nil
}

// MakeVolume makes the key of a new disk under the release key of the running
// image, and the rollback counter with it. One volume is in the making at a
// time; another call forgets the one before.
func (a *Attester) MakeVolume(release []byte) (*seal.Unbound, error) {
	a.volumes.Lock()
	defer a.volumes.Unlock()
	if _, err := a.Organization.Escrow(); err != nil {
		return nil, err
	}
	s, sealFor, err := a.volumeSealer(release)
	if err != nil {
		return nil, err
	}
	u, err := seal.Make(seal.PurposeDisk, func(secret seal.Secret) (seal.Sealed, error) { return sealFor(seal.PurposeDisk, secret) })
	if err != nil {
		return nil, err
	}
	auth, err := u.Lockout()
	if err != nil {
		return nil, err
	}
	// Where somebody set one before the disk is as safe without.
	if set, err := s.OwnLockout(auth); err != nil || !set {
		a.Log.Warn("the TPM's lock-out keeps the authorisation it has", "error", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.making != nil {
		a.making.Wipe()
	}
	a.making = u
	return u, nil
}

// BindVolume ties the volume in the making to its header and returns it. A nil
// error proves that a verifier has stored the recovery key in escrow and that
// the use of the key is measured. gate.ErrNotEscrowed: not yet.
func (a *Attester) BindVolume(ctx context.Context, id []byte, header attest.Digest) (*seal.Volume, error) {
	a.volumes.Lock() // nobody wipes it meanwhile
	defer a.volumes.Unlock()
	a.mu.Lock()
	u, device := a.making, a.device
	a.mu.Unlock()
	if u == nil || !bytes.Equal(u.ID(), id) {
		return nil, errors.New("volume: none of this id is in the making; make it again")
	}
	v, err := u.Bind(header)
	if err != nil {
		return nil, err
	}
	if err := a.escrow(ctx, u); err != nil {
		return nil, fmt.Errorf("%w: %w", gate.ErrNotEscrowed, err)
	}
	if err := a.Record(attest.RunEvent{Kind: attest.EventDiskKey, Detail: seal.Measurement(u.Key, device)}); err != nil {
		return nil, fmt.Errorf("volume: the use of its key could not be measured: %w", err)
	}
	a.mu.Lock()
	a.making = nil
	a.mu.Unlock()
	u.Wipe()
	return v, nil
}

// escrow hands the recovery key, encrypted to the organisation, to a verifier,
// signed with the credential: a laptop that was not affirmed has none.
func (a *Attester) escrow(ctx context.Context, u *seal.Unbound) error {
	to, err := a.Organization.Escrow()
	if err != nil {
		return err
	}
	a.mu.Lock()
	device := a.device
	a.mu.Unlock()
	e, err := seal.NewEscrow(to, device, u.ID(), u.Recovery, a.Now())
	if err != nil {
		return err
	}
	req := attest.EscrowRequest{}
	if req.Escrow, err = json.Marshal(e); err != nil {
		return err
	}
	if req.Chain, req.Signature, err = a.credentialed(attest.EscrowDigest(req.Escrow)); err != nil {
		return err
	}
	if err := a.first(ctx, attest.PathEscrow, req, &struct{}{}); err != nil {
		return err
	}
	a.Log.Info("recovery key in escrow", "device", device, "volume", fmt.Sprintf("%x", u.ID()))
	return nil
}

// credentialed signs a digest with the credential in force.
func (a *Attester) credentialed(digest attest.Digest) (chain [][]byte, signature []byte, err error) {
	a.mu.Lock()
	certs := a.chain
	a.mu.Unlock()
	for _, c := range certs {
		chain = append(chain, c.Raw)
	}
	signature, err = a.Sign(digest[:])
	return chain, signature, err
}

// first asks one verifier after the other until one grants the request.
func (a *Attester) first(ctx context.Context, path string, question, answer any) error {
	var errs []error
	for _, r := range a.remotes {
		err := r.callJSON(ctx, path, question, answer)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Recover returns the key of a volume by its recovery key and, where this TPM
// lets it, the volume sealed to it anew: after a board was exchanged the next
// boot needs nobody. The use is measured as any other.
func (a *Attester) Recover(v *seal.Volume, header attest.Digest, release []byte, typed string) (seal.Secret, *seal.Volume, error) {
	r, err := seal.ParseRecovery(typed)
	if err != nil {
		return seal.Secret{}, nil, err
	}
	key, secret, err := v.OpenRecovery(r, header)
	if err != nil {
		return seal.Secret{}, nil, err
	}
	defer secret.Wipe()
	if err := a.openTPM(); err != nil {
		key.Wipe()
		return seal.Secret{}, nil, err
	}
	a.mu.Lock()
	device := a.device
	a.mu.Unlock()
	again, err := a.reseal(v, secret, release)
	if err != nil {
		a.Log.Warn("the volume keeps its seal: this boot cannot seal it anew", "error", err)
		again = nil
	}
	if err := a.Record(attest.RunEvent{Kind: attest.EventDiskKey, Detail: seal.Measurement(key, device)}); err != nil {
		key.Wipe()
		return seal.Secret{}, nil, fmt.Errorf("recover: the use of the key could not be measured, so it is not given: %w", err)
	}
	return key, again, nil
}

// reseal seals the secret of v to this TPM, under the release key of the
// running image. A release that this device may not run any more seals
// nothing.
func (a *Attester) reseal(v *seal.Volume, secret seal.Secret, release []byte) (*seal.Volume, error) {
	_, sealFor, err := a.volumeSealer(release)
	if err != nil {
		return nil, err
	}
	again := *v
	again.Sealed, err = sealFor(v.Purpose, secret)
	return &again, err
}

// RaiseRollback raises the rollback counter to the epoch of the running image:
// no older release opens anything after it.
func (a *Attester) RaiseRollback(release []byte) error {
	r, signer, err := seal.ReadRelease(release)
	if err != nil {
		return err
	}
	if err := a.openTPM(); err != nil {
		return err
	}
	a.mu.Lock()
	hw := a.hw
	a.mu.Unlock()
	c, ok := hw.(interface {
		RaiseRollback(*seal.Release, seal.ReleaseKey) error
	})
	if !ok {
		return errors.New("rollback counter: the TPM was closed, or has none; try again")
	}
	return c.RaiseRollback(r, signer)
}

func (a *Attester) serveRollback(w http.ResponseWriter, r *http.Request) {
	var req gate.VolumeRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	if err := a.RaiseRollback(req.Release); err != nil {
		a.refuse(w, "rollback counter", err)
		return
	}
	writeJSON(w, struct{}{})
}

// CheckUpdate says whether next may follow the running release. A nil error
// proves: next is signed by the release key that signed running, for the same
// Secure Boot keys, and its epoch is not below the rollback counter.
func (a *Attester) CheckUpdate(running, next []byte) error {
	now, signer, err := seal.ReadRelease(running)
	if err != nil {
		return err
	}
	r, err := seal.ParseRelease(next, signer)
	if err != nil {
		return fmt.Errorf("%w: %w", seal.ErrRelease, err)
	}
	if r.PCRs[7] != now.PCRs[7] {
		return &seal.Mismatch{PCR: 7, Want: r.PCRs[7], Seen: now.PCRs[7]}
	}
	if err := a.openTPM(); err != nil {
		return err
	}
	a.mu.Lock()
	hw := a.hw
	a.mu.Unlock()
	c, ok := hw.(interface{ Counter() (uint64, error) })
	if !ok {
		return errors.New("update: the TPM was closed, or has no counter; try again")
	}
	count, err := c.Counter()
	if err != nil {
		return fmt.Errorf("update: %w", err)
	}
	if count > r.Epoch {
		return fmt.Errorf("update: %w: epoch %d, the counter is %d", seal.ErrRolledBack, r.Epoch, count)
	}
	return nil
}

func (a *Attester) serveRelease(w http.ResponseWriter, r *http.Request) {
	var req gate.UpdateRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	if err := a.CheckUpdate(req.Running, req.Next); err != nil {
		a.refuse(w, "update", err)
		return
	}
	writeJSON(w, struct{}{})
}

// volumeRoutes are for root alone.
func (a *Attester) volumeRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/unlock", a.forRoot(a.serveUnlock))
	mux.HandleFunc("POST /v1/volume", a.forRoot(a.serveMake))
	mux.HandleFunc("POST /v1/volume/bind", a.forRoot(a.serveBind))
	mux.HandleFunc("POST /v1/volume/recover", a.forRoot(a.serveRecover))
	mux.HandleFunc("POST /v1/rollback", a.forRoot(a.serveRollback))
	mux.HandleFunc("POST /v1/release", a.forRoot(a.serveRelease))
	mux.HandleFunc("POST /v1/update", a.forRoot(a.serveNext))
	mux.HandleFunc("GET /v1/update/image", a.forRoot(a.serveImage))
}

func (a *Attester) forRoot(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !isRoot(r) {
			http.Error(w, "only root may have a key", http.StatusForbidden)
			return
		}
		a.patient(w, keyTime)
		h(w, r)
	}
}

// decodeVolume reads a request about a volume; its failure is answered.
func decodeVolume(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxUnlock))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// refuse answers a request about a volume that was not granted.
func (a *Attester) refuse(w http.ResponseWriter, what string, err error) {
	a.Log.Warn(what, "error", err)
	if errors.Is(err, gate.ErrNotEscrowed) {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	data, jerr := json.Marshal(gate.KeyRefused{Codes: refusalCodes(err), Detail: err.Error()})
	if jerr != nil {
		http.Error(w, jerr.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	w.Write(append(data, '\n'))
}

// refusalCodes says what keeps a key shut; nothing, if trying again may help.
func refusalCodes(err error) (codes []string) {
	for _, m := range mismatches(err) {
		codes = append(codes, fmt.Sprintf("pcr-%d", m.PCR))
	}
	for code, sentinel := range map[string]error{
		gate.CodeRolledBack: seal.ErrRolledBack, gate.CodeOtherTPM: tpm.ErrStorageKey, gate.CodeHeader: seal.ErrHeader,
		gate.CodeNoEscrow: attest.ErrNoEscrow, gate.CodePolicy: seal.ErrRelease, gate.CodeRecovery: seal.ErrRecovery,
	} {
		if errors.Is(err, sentinel) {
			codes = append(codes, code)
		}
	}
	if len(codes) == 0 && errors.Is(err, tpm.ErrUnseal) {
		codes = []string{gate.CodeRefused}
	}
	slices.Sort(codes)
	return codes
}

// mismatches finds every PCR that differs in a tree of errors.
func mismatches(err error) (list []*seal.Mismatch) {
	switch e := err.(type) {
	case nil:
	case *seal.Mismatch:
		list = append(list, e)
	case interface{ Unwrap() []error }:
		for _, u := range e.Unwrap() {
			list = append(list, mismatches(u)...)
		}
	case interface{ Unwrap() error }:
		list = mismatches(e.Unwrap())
	}
	return list
}

func (a *Attester) serveUnlock(w http.ResponseWriter, r *http.Request) {
	var req gate.UnlockRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	v, err := seal.ParseVolume(req.Volume)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key, err := a.Unlock(v, req.Header, req.Release)
	if err != nil {
		a.refuse(w, "unlock", err)
		return
	}
	defer key.Wipe()
	writeJSON(w, gate.UnlockResponse{Key: key.Reveal()})
}

func (a *Attester) serveMake(w http.ResponseWriter, r *http.Request) {
	var req gate.VolumeRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	u, err := a.MakeVolume(req.Release)
	if err != nil {
		a.refuse(w, "new volume", err)
		return
	}
	writeJSON(w, gate.NewVolume{ID: u.ID(), Key: u.Key.Reveal(), Recovery: u.Recovery.Reveal()})
}

func (a *Attester) serveBind(w http.ResponseWriter, r *http.Request) {
	var req gate.BindRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	v, err := a.BindVolume(r.Context(), req.ID, req.Header)
	if err != nil {
		a.refuse(w, "bind volume", err)
		return
	}
	data, err := v.Encode()
	if err != nil {
		a.refuse(w, "bind volume", err)
		return
	}
	writeJSON(w, gate.BoundVolume{Volume: data})
}

func (a *Attester) serveRecover(w http.ResponseWriter, r *http.Request) {
	var req gate.RecoverRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	v, err := seal.ParseVolume(req.Volume)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key, again, err := a.Recover(v, req.Header, req.Release, req.Recovery)
	if err != nil {
		a.refuse(w, "recover", err)
		return
	}
	defer key.Wipe()
	answer := gate.RecoverResponse{Key: key.Reveal()}
	if again != nil {
		if answer.Volume, err = again.Encode(); err != nil {
			a.refuse(w, "recover", err)
			return
		}
	}
	writeJSON(w, answer)
}
