package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/seal"
)

// AdminRecoveries is where releases of recovery keys are recorded.
const AdminRecoveries = "/admin/v1/recoveries" // GET → []Recovery; POST approval.Signed → Recovery

// Recovery is the release of a recovery key that was recorded, and with that
// used up. The key itself never comes near the verifier.
type Recovery struct {
	ID attest.Digest `json:"id"` // of the approval
	seal.RecoveryRequest
	Signers []string  `json:"signers"` // SHA-256 of their public keys
	Used    time.Time `json:"used"`
}

func (k keys) recovery(id attest.Digest) string { return string(k) + "recovery/" + id.String() }

// UseRecovery records the release of a recovery key. A nil error proves: enough
// different approvers have signed it, it has not expired, and it was not used
// before, with any verifier of the organisation.
func (s *Service) UseRecovery(ctx context.Context, signed *approval.Signed) (Recovery, error) {
	payload, who, err := s.Approvers.Verify(seal.ApproveRecovery, signed)
	if err != nil {
		return Recovery{}, fmt.Errorf("recovery: %w", err)
	}
	now := s.Now().UTC()
	r := Recovery{ID: signed.ID(), Signers: who, Used: now.Truncate(time.Second)}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&r.RecoveryRequest); err != nil {
		return Recovery{}, fmt.Errorf("recovery: %w", err)
	}
	if !now.Before(r.Expires) {
		return Recovery{}, fmt.Errorf("recovery: %w: the approval expired at %s; ask for a new one", approval.ErrNotApproved, r.Expires.Format(time.RFC3339))
	}
	_, err = s.Store.Update(ctx, func(t concurrency.STM) error {
		old, used, err := read[Recovery](t, s.keys.recovery(r.ID))
		if err != nil {
			return err
		}
		if used {
			return fmt.Errorf("recovery: %w: the approval was used at %s; have a new one signed", approval.ErrNotApproved, old.Used.Format(time.RFC3339))
		}
		return write(t, s.keys.recovery(r.ID), r)
	})
	if err != nil {
		return Recovery{}, err
	}
	return r, nil
}

// Recoveries lists the releases of recovery keys, oldest first.
func (s *Service) Recoveries(ctx context.Context) ([]Recovery, error) {
	list := []Recovery{}
	err := scan(ctx, s, "recovery", func(r Recovery) { list = append(list, r) })
	slices.SortStableFunc(list, func(a, b Recovery) int { return a.Used.Compare(b.Used) })
	return list, err
}

func (a *admin) recoveryRoutes() []route {
	return []route{
		{pattern: "GET " + AdminRecoveries, handler: func(w http.ResponseWriter, r *http.Request) {
			list, err := a.Recoveries(r.Context())
			answer(a, w, list, err)
		}},
		{pattern: "POST " + AdminRecoveries, handler: a.useRecovery},
	}
}

func (a *admin) useRecovery(w http.ResponseWriter, r *http.Request) {
	signed, ok := a.approval(w, r)
	if !ok {
		return
	}
	used, err := a.UseRecovery(r.Context(), signed)
	switch {
	case errors.Is(err, approval.ErrNotApproved):
		a.log.Warn("release of a recovery key refused", "id", signed.ID(), "error", err)
		a.fail(w, http.StatusForbidden, err)
	case err != nil:
		a.fail(w, http.StatusInternalServerError, err)
	default:
		a.log.Warn("recovery key released", "id", used.ID, "device", used.Device, "signers", used.Signers, "reason", used.Reason)
		reply(w, http.StatusOK, used)
	}
}

// UseRecovery uses up the approval of a recovery key's release.
func (a *Admin) UseRecovery(ctx context.Context, signed *approval.Signed) (r Recovery, err error) {
	body, err := json.Marshal(signed)
	if err != nil {
		return r, err
	}
	return r, a.do(ctx, http.MethodPost, AdminRecoveries, body, &r)
}

// Recoveries lists the releases of recovery keys, oldest first.
func (a *Admin) Recoveries(ctx context.Context) (list []Recovery, err error) {
	return list, a.do(ctx, http.MethodGet, AdminRecoveries, nil, &list)
}
