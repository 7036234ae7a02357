package attester

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// ReleaseFile is where the boot stub puts the image's signed policies
// (systemd-stub(7); docs/sealing.md).
const ReleaseFile = "/.extra/tpm2-pcr-signature.json"

// LogonKeys makes and uses keys of the card; *tpm.TPM has it.
type LogonKeys interface {
	CreateLogonKey(b tpm.Boot, kind string, agreement bool) (tpm.CardKey, error)
	UseLogonKey(b tpm.Boot, key seal.Sealed, op attest.LogonOperation, input []byte) ([]byte, error)
}

// Logon is what attestd does for logind.
type Logon struct {
	UID   uint32 // logind's user, who beside root may ask
	Vault        // logind's state; its Boot is of the card's keys too
}

// NewLogon returns what attestd does for logind, the first of users; nil where
// the organisation has no logon or the image no such user. release is the file
// of the image's signed policies, state the state partition.
func NewLogon(org *attest.Organization, users []uint32, release, state string) (*Logon, error) {
	if org.Logon == nil || len(users) == 0 {
		return nil, nil
	}
	boot, err := ReadBoot(release)
	if err != nil {
		return nil, err
	}
	return &Logon{UID: users[0], Vault: Vault{Boot: boot, State: LogonFile(state)}}, nil
}

// ReadBoot reads the image's signed policies. A file that is absent binds
// logon keys to the TPM alone.
func ReadBoot(path string) (tpm.Boot, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return tpm.Boot{}, nil
	}
	if err != nil {
		return tpm.Boot{}, fmt.Errorf("release policy: %w", err)
	}
	r, key, err := seal.ReadRelease(data)
	if err != nil {
		return tpm.Boot{}, err
	}
	return tpm.Boot{Release: r, Key: key}, nil
}

// logonTPM returns the open TPM.
func (a *Attester) logonTPM() (Hardware, error) {
	if err := a.openTPM(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.hw == nil {
		return nil, errors.New("the TPM was closed; try again")
	}
	return a.hw, nil
}

func (a *Attester) sealer() (StateSealer, error) {
	hw, err := a.logonTPM()
	if err != nil {
		return nil, err
	}
	s, ok := hw.(StateSealer)
	if !ok {
		return nil, errors.New("state: this TPM does not seal")
	}
	return s, nil
}

// CreateLogonKey makes a key of the card.
func (a *Attester) CreateLogonKey(kind string, agreement bool) (gate.LogonKey, error) {
	hw, err := a.logonTPM()
	if err != nil {
		return gate.LogonKey{}, err
	}
	keys, ok := hw.(LogonKeys)
	if !ok {
		return gate.LogonKey{}, errors.New("logon: this TPM makes no logon keys")
	}
	k, err := keys.CreateLogonKey(a.Logon.Boot, kind, agreement)
	if err != nil {
		return gate.LogonKey{}, err
	}
	wrapped, err := json.Marshal(k.Sealed)
	return gate.LogonKey{
		Key: wrapped, Public: k.SPKI, Area: k.Sealed.Public, Storage: k.Sealed.Storage,
		AK: hw.Identity().AK, Certify: k.Certify, CertifySig: k.CertifySig, Bound: a.Logon.Boot.Release != nil,
	}, err
}

// UseLogonKey does one operation with a key of the card, if the gate for logon
// is open.
func (a *Attester) UseLogonKey(key seal.Sealed, op attest.LogonOperation, input []byte) ([]byte, error) {
	a.mu.Lock()
	_, open := gate.Open(a.status, gate.Logon, a.Now())
	hw, inForce := a.inForce()
	a.mu.Unlock()
	if !open || !inForce {
		return nil, errShut
	}
	keys, ok := hw.(LogonKeys)
	if !ok {
		return nil, errors.New("logon: this TPM has no logon keys")
	}
	return keys.UseLogonKey(a.Logon.Boot, key, op, input)
}

// LoadLogonState returns logind's state; ErrNoRecord when there is none.
func (a *Attester) LoadLogonState() ([]byte, error) { return a.Logon.load(a.sealer) }

// SaveLogonState keeps logind's state.
func (a *Attester) SaveLogonState(state []byte) error { return a.Logon.save(a.sealer, state) }

// ReportLogon hands what is new of the card to a verifier, as this device.
func (a *Attester) ReportLogon(ctx context.Context, n attest.LogonNews) (answer attest.LogonAnswer, err error) {
	a.mu.Lock()
	n.Device = a.device
	a.mu.Unlock()
	var r attest.LogonReport
	if r.News, err = json.Marshal(n); err != nil {
		return answer, err
	}
	if r.Chain, r.Signature, err = a.credentialed(attest.LogonDigest(r.News)); err != nil {
		return answer, err
	}
	return answer, a.first(ctx, attest.PathLogon, r, &answer)
}

// logonRoutes are the paths of attestd's socket for logind.
func (a *Attester) logonRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/logon/keys", forLogind(a, func(w http.ResponseWriter, req gate.CreateLogonKey) {
		k, err := a.CreateLogonKey(req.Kind, req.Agreement)
		a.answerLogon(w, k, err)
	}))
	mux.HandleFunc("POST /v1/logon/use", forLogind(a, func(w http.ResponseWriter, req gate.UseLogonKey) {
		var key seal.Sealed
		if err := json.Unmarshal(req.Key, &key); err != nil {
			http.Error(w, "key: "+err.Error(), http.StatusBadRequest)
			return
		}
		out, err := a.UseLogonKey(key, req.Operation, req.Input)
		a.answerLogon(w, gate.LogonOutput{Output: out}, err)
	}))
	mux.HandleFunc("PUT /v1/logon/state", forLogind(a, func(w http.ResponseWriter, req gate.LogonState) {
		if len(req.State) > gate.MaxLogonState {
			http.Error(w, fmt.Sprintf("state of %d bytes, at most %d", len(req.State), gate.MaxLogonState), http.StatusRequestEntityTooLarge)
			return
		}
		a.answerLogon(w, struct{}{}, a.SaveLogonState(req.State))
	}))
	mux.HandleFunc("POST /v1/logon/report", func(w http.ResponseWriter, r *http.Request) {
		forLogind(a, func(w http.ResponseWriter, n attest.LogonNews) {
			answer, err := a.ReportLogon(r.Context(), n)
			a.answerLogon(w, answer, err)
		})(w, r)
	})
	mux.HandleFunc("GET /v1/logon/state", func(w http.ResponseWriter, r *http.Request) {
		if !a.isLogind(r) {
			http.Error(w, "only logind may do this", http.StatusForbidden)
			return
		}
		a.patient(w, keyTime)
		state, err := a.LoadLogonState()
		if errors.Is(err, ErrNoRecord) {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		a.answerLogon(w, gate.LogonState{State: state}, err)
	})
}

// forLogind reads a request of logind's and passes it on.
func forLogind[T any](a *Attester, do func(http.ResponseWriter, T)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !a.isLogind(r) {
			http.Error(w, "only logind may do this", http.StatusForbidden)
			return
		}
		var req T
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 2*gate.MaxLogonState))
		d.DisallowUnknownFields()
		if err := d.Decode(&req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.patient(w, keyTime)
		do(w, req)
	}
}

// isLogind reports whether a request comes from logind or from root.
func (a *Attester) isLogind(r *http.Request) bool {
	uid, ok := r.Context().Value(peerKey{}).(uint32)
	return ok && uid == a.Logon.UID || isRoot(r)
}

func (a *Attester) answerLogon(w http.ResponseWriter, v any, err error) {
	switch {
	case errors.Is(err, errShut):
		http.Error(w, err.Error(), http.StatusForbidden)
	case err != nil:
		a.Log.Error("logon", "error", err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		writeJSON(w, v)
	}
}
