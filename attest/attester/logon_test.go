package attester

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// logonHardware is a TPM that answers as one with logon keys would.
type logonHardware struct {
	Hardware
	uses   int
	secret seal.Secret
	shut   bool // this boot may not unseal
}

func (h *logonHardware) CreateLogonKey(tpm.Boot, string, bool) (tpm.CardKey, error) {
	return tpm.CardKey{SPKI: []byte("spki")}, nil
}

func (h *logonHardware) UseLogonKey(_ tpm.Boot, _ seal.Sealed, _ attest.LogonOperation, in []byte) ([]byte, error) {
	h.uses++
	return append([]byte("signed "), in...), nil
}

func (h *logonHardware) SealState(_ tpm.Boot, s seal.Secret) (seal.Sealed, error) {
	h.secret = s
	return seal.Sealed{Public: []byte("sealed")}, nil
}

func (h *logonHardware) UnsealState(tpm.Boot, seal.Sealed) (seal.Secret, error) {
	if h.shut {
		return seal.Secret{}, errors.New("another image")
	}
	return h.secret, nil
}

const logindUID, netdUID = 4242, 4243

// newLogonAttester is an attester with logon whose gate is open until end.
func newLogonAttester(t *testing.T, hw *logonHardware, state string, end time.Time) *Attester {
	t.Helper()
	a := &Attester{change: make(chan struct{})}
	a.Now = time.Now
	a.Log = slog.New(slog.DiscardHandler)
	a.Logon = &Logon{UID: logindUID, Vault: Vault{State: LogonFile(state)}}
	a.hw = hw
	a.status = gate.Status{State: gate.StateAffirming, NotAfter: end}
	a.facts.NotAfter = end
	return a
}

func (a *Attester) ask(t *testing.T, uid uint32, method, path string, body any) *httptest.ResponseRecorder {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(method, path, bytes.NewReader(data))
	r = r.WithContext(context.WithValue(r.Context(), peerKey{}, uid))
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, r)
	return w
}

func stateFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(path, make([]byte, PartitionSize), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Only logind and root may use logon keys, and logind nothing else that signs.
func TestLogonIsForLogind(t *testing.T) {
	hw := &logonHardware{}
	a := newLogonAttester(t, hw, stateFile(t), time.Now().Add(time.Hour))
	use := gate.UseLogonKey{Key: json.RawMessage("{}"), Operation: attest.LogonSign, Input: []byte("x")}
	for path, body := range map[string]any{"/v1/logon/keys": gate.CreateLogonKey{Kind: attest.LogonP256}, "/v1/logon/use": use} {
		if w := a.ask(t, netdUID, http.MethodPost, path, body); w.Code != http.StatusForbidden {
			t.Errorf("%s as netd: %d", path, w.Code)
		}
	}
	for _, m := range []string{http.MethodGet, http.MethodPut} {
		if w := a.ask(t, netdUID, m, "/v1/logon/state", gate.LogonState{}); w.Code != http.StatusForbidden {
			t.Errorf("%s state as netd: %d", m, w.Code)
		}
	}
	if hw.uses != 0 {
		t.Error("a key was used for netd")
	}
	if w := a.ask(t, logindUID, http.MethodPost, "/v1/sign", gate.SignRequest{Digest: make([]byte, 32)}); w.Code != http.StatusForbidden {
		t.Errorf("the credential's key as logind: %d", w.Code)
	}
}

// The gate is attestd's too: without an affirming result in force no key is
// used, whatever logind believes.
func TestLogonGate(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		state string
		end   time.Time
		open  bool
	}{
		"affirming": {gate.StateAffirming, now.Add(time.Hour), true},
		"lapsed":    {gate.StateAffirming, now.Add(-time.Second), false},
		"refused":   {gate.StateRefused, now.Add(time.Hour), false},
		"unknown":   {"", now.Add(time.Hour), false},
	} {
		hw := &logonHardware{}
		a := newLogonAttester(t, hw, stateFile(t), c.end)
		a.status.State = c.state
		a.chain = []*x509.Certificate{{}}
		_, err := a.UseLogonKey(seal.Sealed{}, attest.LogonSign, []byte("x"))
		if (err == nil) != c.open || (hw.uses > 0) != c.open {
			t.Errorf("%s: %v, %d uses", name, err, hw.uses)
		}
	}
}

// What logind keeps is on the disk only encrypted, comes back after a start,
// and not in a boot that may not have it.
func TestLogonState(t *testing.T) {
	hw, path := &logonHardware{}, stateFile(t)
	a := newLogonAttester(t, hw, path, time.Time{})
	if w := a.ask(t, logindUID, http.MethodGet, "/v1/logon/state", nil); w.Code != http.StatusNotFound {
		t.Fatalf("nothing saved: %d", w.Code)
	}
	for _, s := range []string{"a template of a finger", "another"} {
		if w := a.ask(t, logindUID, http.MethodPut, "/v1/logon/state", gate.LogonState{State: []byte(s)}); w.Code != http.StatusOK {
			t.Fatalf("save: %d %s", w.Code, w.Body)
		}
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(disk, []byte("template")) || !bytes.Contains(disk, []byte(logonMagic)) {
		t.Error("the state is not encrypted, or not there")
	}
	next := newLogonAttester(t, hw, path, time.Time{}) // after a start
	if s, err := next.LoadLogonState(); err != nil || string(s) != "another" {
		t.Errorf("%q, %v", s, err)
	}
	// A power cut in the newest slot leaves the one before.
	i := bytes.LastIndex(disk, []byte(logonMagic))
	disk[i+headSize] ^= 1
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := newLogonAttester(t, hw, path, time.Time{}).LoadLogonState(); err != nil || string(s) != "a template of a finger" {
		t.Errorf("after the cut: %q, %v", s, err)
	}
	hw.shut = true
	if _, err := newLogonAttester(t, hw, path, time.Time{}).LoadLogonState(); err == nil || errors.Is(err, ErrNoRecord) {
		t.Errorf("another image: %v", err)
	}
	if w := a.ask(t, logindUID, http.MethodPut, "/v1/logon/state", gate.LogonState{State: make([]byte, gate.MaxLogonState+1)}); w.Code == http.StatusOK {
		t.Error("a state over the bound was kept")
	}
}

// patientRecorder notes how long an answer may take.
type patientRecorder struct {
	*httptest.ResponseRecorder
	until time.Time
}

func (p *patientRecorder) SetWriteDeadline(t time.Time) error {
	p.until = t
	return nil
}

// TestLogonAnswersMayTakeLong: a discrete TPM takes up to a minute for an RSA
// key, longer than attestd gives other answers.
func TestLogonAnswersMayTakeLong(t *testing.T) {
	a := newLogonAttester(t, &logonHardware{}, stateFile(t), time.Now().Add(time.Hour))
	for _, call := range [][2]string{{"PUT", "/v1/logon/state"}, {"GET", "/v1/logon/state"}} {
		r := httptest.NewRequest(call[0], call[1], bytes.NewReader([]byte("{}")))
		r = r.WithContext(context.WithValue(r.Context(), peerKey{}, uint32(logindUID)))
		w := &patientRecorder{ResponseRecorder: httptest.NewRecorder()}
		a.handler().ServeHTTP(w, r)
		if left := time.Until(w.until); left < time.Minute {
			t.Errorf("%s: %v for the answer", call, left)
		}
	}
}
