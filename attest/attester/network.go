package attester

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// Network is what attestd does for netd: it keeps the secrets by which the
// laptop gets into networks. They are needed before the verifier can be
// reached, so neither attestation nor the work disk stands before them: the TPM
// gives their key to every boot that the release signed.
type Network struct {
	UID     uint32 // netd's user, who beside root may ask
	Release string // file of the image's signed policies
	Vault
}

// NewNetwork returns what attestd does for netd, the first of users; nil where
// the image has no such user. release is the file of the image's signed
// policies, state the state partition.
func NewNetwork(users []uint32, release, state string) *Network {
	if len(users) == 0 {
		return nil
	}
	return &Network{UID: users[0], Release: release, Vault: Vault{State: NetFile(state)}}
}

// readBoot reads the image's signed policies, once. An image without any keeps
// nothing: its key would open for whatever boots here. n.mu is held.
func (n *Network) readBoot() error {
	if n.Boot.Release != nil {
		return nil
	}
	b, err := ReadBoot(n.Release)
	if err == nil && b.Release == nil {
		err = fmt.Errorf("%w: this image carries none, so no network is kept over power-off", seal.ErrRelease)
	}
	if err != nil {
		return err
	}
	b.Purpose = seal.PurposeNet
	n.Boot = b
	return nil
}

// LoadNetworkState returns netd's state; ErrNoRecord when there is none. One
// that no boot can open again, of another TPM or damaged, is none.
func (a *Attester) LoadNetworkState() ([]byte, error) {
	n := a.Network
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.readBoot(); err != nil {
		return nil, err
	}
	state, err := n.open(a.sealer)
	if errors.Is(err, tpm.ErrStorageKey) || errors.Is(err, errDamaged) {
		a.Log.Warn("what was kept of networks is lost", "error", err)
		n.sealed = nil
		return nil, ErrNoRecord
	}
	return state, err
}

// SaveNetworkState keeps netd's state. What this boot cannot open it does not
// overwrite: the boot that can is the organisation's.
func (a *Attester) SaveNetworkState(state []byte) error {
	if _, err := a.LoadNetworkState(); err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	n := a.Network
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.sealed == nil { // the policy that opens it asks for the counter
		hw, err := a.logonTPM()
		if err != nil {
			return err
		}
		c, ok := hw.(interface {
			CreateRollbackCounter(*seal.Release, seal.ReleaseKey) error
		})
		if !ok {
			return errors.New("network state: this TPM has no counters")
		}
		if err := c.CreateRollbackCounter(n.Boot.Release, n.Boot.Key); err != nil {
			return err
		}
	}
	return n.put(a.sealer, state)
}

// NetworkCertificate asks the verifiers to certify a key as this laptop's
// network identity, signed with the credential: a laptop that was not affirmed
// has none.
func (a *Attester) NetworkCertificate(ctx context.Context, request []byte) ([]byte, error) {
	a.mu.Lock()
	chain := a.chain
	a.mu.Unlock()
	req := attest.NetworkRequest{Request: request}
	for _, c := range chain {
		req.Chain = append(req.Chain, c.Raw)
	}
	digest := attest.NetworkDigest(request)
	var err error
	if req.Signature, err = a.Sign(digest[:]); err != nil {
		return nil, err
	}
	var errs []error
	for _, r := range a.remotes {
		var answer attest.NetworkCertificate
		err := r.callJSON(ctx, attest.PathNetwork, req, &answer)
		if err == nil {
			return answer.Certificate, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// networkRoutes are the paths of attestd's socket for netd.
func (a *Attester) networkRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/network/state", a.forNetd(func(w http.ResponseWriter, _ *http.Request) {
		state, err := a.LoadNetworkState()
		switch {
		case errors.Is(err, ErrNoRecord):
			http.Error(w, err.Error(), http.StatusNotFound)
		case err != nil:
			a.refuse(w, "network state", err)
		default:
			writeJSON(w, gate.NetworkState{State: state})
		}
	}))
	mux.HandleFunc("PUT /v1/network/state", a.forNetd(func(w http.ResponseWriter, r *http.Request) {
		var req gate.NetworkState
		if !decodeNetwork(w, r, &req) {
			return
		}
		if len(req.State) > gate.MaxNetworkState {
			http.Error(w, fmt.Sprintf("state of %d bytes, at most %d", len(req.State), gate.MaxNetworkState), http.StatusRequestEntityTooLarge)
			return
		}
		if err := a.SaveNetworkState(req.State); err != nil {
			a.refuse(w, "network state", err)
			return
		}
		writeJSON(w, struct{}{})
	}))
	mux.HandleFunc("POST /v1/network/certificate", a.forNetd(func(w http.ResponseWriter, r *http.Request) {
		var req gate.NetworkRequest
		if !decodeNetwork(w, r, &req) {
			return
		}
		cert, err := a.NetworkCertificate(r.Context(), req.Request)
		switch {
		case errors.Is(err, errShut):
			http.Error(w, err.Error(), http.StatusConflict)
		case err != nil:
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		default:
			writeJSON(w, gate.NetworkCertificate{Certificate: cert})
		}
	}))
}

// forNetd lets netd and root in, and gives them time.
func (a *Attester) forNetd(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if uid, ok := r.Context().Value(peerKey{}).(uint32); !isRoot(r) && (!ok || uid != a.Network.UID) {
			http.Error(w, "only netd may do this", http.StatusForbidden)
			return
		}
		a.patient(w, keyTime)
		h(w, r)
	}
}

// decodeNetwork reads a request of netd's; its failure is answered, without
// repeating what may be secret.
func decodeNetwork(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 2*gate.MaxNetworkState))
	d.DisallowUnknownFields()
	if d.Decode(v) != nil {
		http.Error(w, "not a request about networks", http.StatusBadRequest)
		return false
	}
	return true
}
