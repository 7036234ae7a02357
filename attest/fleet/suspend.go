package fleet

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/verifier"
)

// AdminSuspensions is the path of the admin API for suspensions: GET →
// []attest.Revocation; POST SuspensionRequest → attest.Revocation.
const AdminSuspensions = "/admin/v1/suspensions"

// SuspensionRequest suspends, or ends that.
type SuspensionRequest struct {
	Kind    string `json:"kind"`    // "device", "key", "policy", "user", "organization"
	Subject string `json:"subject"` // id of the device, SHA-256 of the key, version, user; of "organization" empty
	Resume  bool   `json:"resume"`
	Reason  string `json:"reason"` // needed to suspend
}

// errSuspend is a request that cannot be done as it is.
var errSuspend = errors.New("suspend")

// revocation is what a request is about.
func (r SuspensionRequest) revocation() (v attest.Revocation, err error) {
	switch v.Kind = r.Kind; r.Kind {
	case "device":
		v.Kind = attest.RevokeDevice
		err = v.Device.UnmarshalText([]byte(r.Subject))
	case attest.RevokeKey:
		err = v.Key.UnmarshalText([]byte(r.Subject))
	case attest.RevokePolicy:
		v.Policy, err = strconv.ParseUint(r.Subject, 10, 64)
	case attest.RevokeUser:
		if v.User = r.Subject; v.User == "" || len(v.User) > attest.MaxName {
			err = fmt.Errorf("user of %d bytes, want 1 to %d", len(v.User), attest.MaxName)
		}
	case attest.RevokeOrganization:
		if r.Subject != "" {
			err = errors.New("the organisation has no further name")
		}
	default:
		err = fmt.Errorf("%.64q: want device, key, policy, user or organization", r.Kind)
	}
	if err == nil && !r.Resume && (r.Reason == "" || len(r.Reason) > attest.MaxName) {
		err = fmt.Errorf("reason of %d bytes, want 1 to %d", len(r.Reason), attest.MaxName)
	}
	if err != nil {
		return v, fmt.Errorf("%w: %w", errSuspend, err)
	}
	v.Revoked, v.Reason = !r.Resume, r.Reason
	return v, nil
}

// Suspend suspends a device, a key, a policy's version, a user or the whole
// organisation, or ends that. When it has returned, this verifier affirms
// nobody whom it concerns, gateways are being told, and that holds also after
// a crash.
func (s *Service) Suspend(ctx context.Context, r SuspensionRequest) (attest.Revocation, error) {
	v, err := r.revocation()
	if err != nil {
		return v, err
	}
	now := s.Now()
	v.Time = now.Unix()
	switch {
	case v.Kind == attest.RevokePolicy && v.Revoked:
		if v.From, err = s.Policies.since(v.Policy); err != nil {
			return v, err
		}
		v.From -= int64(verifier.Backdate / time.Second)
		// Another verifier may issue one more until it has heard.
		v.Until = now.Add(suspendSpread - verifier.Backdate).Unix()
	case v.Kind == attest.RevokeUser && v.Revoked:
		if v.Devices, err = s.devicesOf(ctx, v.User); err != nil {
			return v, err
		}
	}
	return v, s.change(ctx, func(t concurrency.STM) error {
		old, _, err := read[attest.Revocation](t, s.keys.revocationOf(v))
		if err != nil {
			return err
		}
		if v.Kind == attest.RevokeDevice && t.Get(s.keys.device(v.Device)) == "" {
			return fmt.Errorf("%w: device %s: %w", errSuspend, v.Device, errUnknownDevice)
		}
		if !v.Revoked && !old.Revoked {
			return fmt.Errorf("%w: %s is not suspended", errSuspend, v.Subject())
		}
		return s.noteRevocation(t, v)
	})
}

// suspendSpread is how long after a suspension a verifier may not have heard.
const suspendSpread = 5 * time.Second

// Suspensions lists what is suspended now, and devices that were retired.
func (s *Service) Suspensions() []attest.Revocation {
	s.shared.revoked.mu.Lock()
	defer s.shared.revoked.mu.Unlock()
	list := s.shared.revoked.now.List()
	slices.SortFunc(list, func(a, b attest.Revocation) int { return int(int64(a.Sequence) - int64(b.Sequence)) })
	return append([]attest.Revocation{}, list...)
}

// suspended refuses evidence of whom a suspension concerns, before it is
// judged: no report is made and no nonce used. Of a device that has ended its
// registry says more.
func (s *Service) suspended(e *attest.Evidence, rec record) error {
	h := attest.Holder{Device: e.DeviceID()}
	if key, err := tpm.ParsePublic(e.Key); err == nil {
		if spki, err := key.SPKI(); err == nil {
			h.Key = sha256.Sum256(spki)
		}
	}
	v, ok := s.shared.revoked.covers(h)
	if !ok || v.Kind == attest.RevokeDevice && rec.deviceRev == 0 {
		return nil
	}
	kind := v.Kind
	if kind == attest.RevokeDevice {
		kind = "device"
	}
	return attest.Refuse(attest.ReasonSuspended, "the %s is suspended since %s", kind, time.Unix(v.Time, 0).UTC().Format(time.RFC3339))
}

// policySuspended reports whether a version of the policy is suspended: then
// nothing is affirmed until a newer one is in force.
func (s *Service) policySuspended(version uint64) bool {
	s.shared.revoked.mu.Lock()
	defer s.shared.revoked.mu.Unlock()
	return s.shared.revoked.last[attest.Revocation{Kind: attest.RevokePolicy, Policy: version}.Subject()].Revoked
}

// since is from when on a version of the policy may have been in force, in s
// since 1970.
func (p *Policies) since(version uint64) (int64, error) {
	if p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, v := range p.chain.Versions() {
			if v.Bundle.Version == version {
				return v.Bundle.NotBefore, nil
			}
		}
	}
	return 0, fmt.Errorf("%w: no policy of version %d was published", errSuspend, version)
}

// lastUser is who has logged on last on a laptop.
func lastUser(events []attest.LogonEvent) string {
	for _, e := range slices.Backward(events) {
		if e.Reason == "open" && e.User != "" {
			return e.User
		}
	}
	return ""
}

// devicesOf are the devices where a user has logged on last.
func (s *Service) devicesOf(ctx context.Context, user string) ([]attest.Digest, error) {
	var list []attest.Digest
	prefix := s.keys.logons(attest.Digest{})
	prefix = prefix[:len(prefix)-len(attest.Digest{}.String())]
	_, err := s.Store.Scan(ctx, prefix, 0, func(kv *mvccpb.KeyValue) error {
		var id attest.Digest
		var events []attest.LogonEvent
		if err := errors.Join(id.UnmarshalText(kv.Key[len(prefix):]), json.Unmarshal(kv.Value, &events)); err != nil {
			return fmt.Errorf("store: %s: %w", kv.Key, err)
		}
		if lastUser(events) == user {
			list = append(list, id)
		}
		return nil
	})
	return list, err
}

// loggedOn follows a suspended user to another laptop, in the transaction that
// keeps the logons of a device.
func (s *Service) loggedOn(t concurrency.STM, device attest.Digest, events []attest.LogonEvent) error {
	user := lastUser(events)
	if user == "" {
		return nil
	}
	v, found, err := read[attest.Revocation](t, s.keys.revocationOf(attest.Revocation{Kind: attest.RevokeUser, User: user}))
	if err != nil || !found || !v.Revoked || slices.Contains(v.Devices, device) {
		return err
	}
	v.Devices = append(v.Devices, device)
	return s.noteRevocation(t, v)
}

func (a *admin) suspensionRoutes() []route {
	return []route{
		{pattern: "GET " + AdminSuspensions, handler: func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, a.Suspensions()) }},
		{pattern: "POST " + AdminSuspensions, handler: a.suspend},
	}
}

func (a *admin) suspend(w http.ResponseWriter, r *http.Request) {
	data, ok := a.body(w, r, attest.MaxMessage)
	if !ok {
		return
	}
	var req SuspensionRequest
	if err := json.Unmarshal(data, &req); err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	v, err := a.Suspend(r.Context(), req)
	if errors.Is(err, errSuspend) {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	if err == nil {
		a.log.Warn("suspension", "subject", v.Subject(), "suspended", v.Revoked, "reason", v.Reason, "devices", len(v.Devices))
	}
	answer(a, w, v, err)
}

// Suspend suspends something, or ends that.
func (a *Admin) Suspend(ctx context.Context, r SuspensionRequest) (v attest.Revocation, err error) {
	body, err := json.Marshal(r)
	if err != nil {
		return v, err
	}
	return v, a.do(ctx, http.MethodPost, AdminSuspensions, body, &v)
}

// Suspensions lists what is suspended.
func (a *Admin) Suspensions(ctx context.Context) (list []attest.Revocation, err error) {
	return list, a.do(ctx, http.MethodGet, AdminSuspensions, nil, &list)
}
