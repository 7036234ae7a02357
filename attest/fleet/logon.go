package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/approval"
)

// logon.go is what verifiers do for the laptops' smart cards: they keep the
// audit of logons, and pass on permits, which the laptops judge themselves.

// Paths of the admin API for smart cards.
const (
	AdminCards  = "/admin/v1/cards"  // POST approval.Signed → CardPermit; /DEVICE: GET → Card
	AdminLogons = "/admin/v1/logons" // /DEVICE: GET → []attest.LogonEvent, the newest last
)

const (
	maxLogons      = 512 // events kept of one laptop; the verifier's log has all
	maxCardPermits = 16  // in force for one laptop
)

// CardPermit is a permit that the verifier has accepted.
type CardPermit struct {
	ID      attest.Digest     `json:"id"` // of the approval
	Permit  attest.CardPermit `json:"permit"`
	Signers []string          `json:"signers"` // SHA-256 of their public keys
	Added   time.Time         `json:"added"`
	Signed  []byte            `json:"signed"` // as it was presented
}

// Card is what is known of a laptop's smart card.
type Card struct {
	Permits []CardPermit `json:"permits,omitempty"` // that have not expired
	Request []byte       `json:"request,omitempty"` // its newest certificate request, of "logind request -json"
}

// AddCardPermit accepts a permit for a laptop's smart card. A nil error proves:
// enough different approvers have signed it, it is in force, and its device is
// enrolled. The laptop judges it again, by the approvers in its image.
func (s *Service) AddCardPermit(ctx context.Context, signed *approval.Signed) (CardPermit, error) {
	payload, who, err := s.Approvers.Verify(attest.ApproveCard, signed)
	if err != nil {
		return CardPermit{}, fmt.Errorf("card permit: %w", err)
	}
	now := s.Now().UTC()
	p := CardPermit{ID: signed.ID(), Signers: who, Added: now.Truncate(time.Second)}
	if p.Permit, err = attest.ParseCardPermit(payload); err != nil {
		return CardPermit{}, err
	}
	if err := p.Permit.InForce(p.Permit.Device, now); err != nil {
		return CardPermit{}, err
	}
	if p.Signed, err = json.Marshal(signed); err != nil {
		return CardPermit{}, err
	}
	_, err = s.Store.Update(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.device(p.Permit.Device)) == "" {
			return fmt.Errorf("card permit: device %s is not enrolled here", p.Permit.Device)
		}
		card, err := s.card(t, p.Permit.Device, now)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(card.Permits, func(x CardPermit) bool { return x.ID == p.ID }) {
			return errors.New("card permit: was presented already; have a new one signed")
		}
		if len(card.Permits) >= maxCardPermits {
			return fmt.Errorf("card permit: %d are in force for this device, at most %d", len(card.Permits), maxCardPermits)
		}
		card.Permits = append(card.Permits, p)
		return write(t, s.keys.card(p.Permit.Device), card)
	})
	return p, err
}

// card reads a device's card without the permits that have expired.
func (s *Service) card(t concurrency.STM, device attest.Digest, now time.Time) (Card, error) {
	c, _, err := read[Card](t, s.keys.card(device))
	c.Permits = slices.DeleteFunc(c.Permits, func(p CardPermit) bool { return !now.Before(p.Permit.Expires) })
	return c, err
}

// CardOf returns what is known of a device's smart card.
func (s *Service) CardOf(ctx context.Context, device attest.Digest) (c Card, err error) {
	err = s.Store.Read(ctx, func(t concurrency.STM) (err error) {
		c, err = s.card(t, device, s.Now())
		return err
	})
	return c, err
}

// Logons returns the events of a device's smart card, the newest last. They
// stay when the device is retired.
func (s *Service) Logons(ctx context.Context, device attest.Digest) ([]attest.LogonEvent, error) {
	list := []attest.LogonEvent{}
	err := s.Store.Read(ctx, func(t concurrency.STM) error {
		stored, _, err := read[[]attest.LogonEvent](t, s.keys.logons(device))
		list = append([]attest.LogonEvent{}, stored...)
		return err
	})
	return list, err
}

// Logon keeps what a laptop reports of its smart card and answers with the
// permits for it. A nil error proves: the device that it names signed it with
// a credential of ours that is in force, and what it reports is durable.
func (s *Service) Logon(ctx context.Context, r attest.LogonReport) (attest.LogonAnswer, []attest.LogonEvent, error) {
	var answer attest.LogonAnswer
	n, err := attest.ParseLogonNews(r.News)
	if err != nil {
		return answer, nil, attest.Refuse(attest.ReasonRequestMalformed, "%v", err)
	}
	device, err := s.signedBy(r.Chain, attest.LogonDigest(r.News), r.Signature)
	if err != nil {
		return answer, nil, err
	}
	if device != n.Device {
		return answer, nil, attest.Refuse(attest.ReasonDeviceMismatch, "logon report of device %s sent by another", n.Device)
	}
	var fresh []attest.LogonEvent
	keep := func(t concurrency.STM) error {
		answer, fresh = attest.LogonAnswer{}, nil
		if t.Get(s.keys.device(n.Device)) == "" {
			return attest.Refuse(attest.ReasonDeviceUnknown, "device %s is not enrolled here", n.Device)
		}
		card, err := s.card(t, n.Device, s.Now())
		if err != nil {
			return err
		}
		for _, p := range card.Permits {
			answer.Permits = append(answer.Permits, p.Signed)
		}
		if len(n.Request) > 0 && string(n.Request) != string(card.Request) {
			card.Request = n.Request
			if err := write(t, s.keys.card(n.Device), card); err != nil {
				return err
			}
		}
		if len(n.Events) == 0 {
			return nil
		}
		list, _, err := read[[]attest.LogonEvent](t, s.keys.logons(n.Device))
		if err != nil {
			return err
		}
		// A laptop that did not hear our answer sends its events again.
		for _, e := range n.Events {
			answer.Stored = max(answer.Stored, e.Number)
			if !slices.ContainsFunc(list, func(x attest.LogonEvent) bool { return x.Number == e.Number && x.Time.Equal(e.Time) }) {
				list, fresh = append(list, e), append(fresh, e)
			}
		}
		if len(fresh) == 0 {
			return nil
		}
		if err := s.loggedOn(t, n.Device, fresh); err != nil {
			return err
		}
		return write(t, s.keys.logons(n.Device), list[max(0, len(list)-maxLogons):])
	}
	if len(n.Events) == 0 && len(n.Request) == 0 {
		err = s.Store.Read(ctx, keep)
	} else {
		_, err = s.Store.Update(ctx, keep)
	}
	return answer, fresh, err
}

func (a *api) logon(w http.ResponseWriter, r *http.Request) {
	var req attest.LogonReport
	if !a.decode(w, r, &req) {
		return
	}
	answer, fresh, err := a.service.Logon(r.Context(), req)
	if err == nil {
		for _, e := range fresh {
			a.log.Info("logon", "user", e.User, "what", e.What, "factor", e.Factor, "reason", e.Reason, "result", e.Result, "permit", e.Permit, "number", e.Number, "time", e.Time)
		}
	}
	a.answer(w, r, "logon report", answer, err)
}

func (a *admin) logonRoutes() []route {
	return []route{
		{pattern: "POST " + AdminCards, handler: a.addCardPermit},
		{pattern: "GET " + AdminCards + "/{id}", handler: func(w http.ResponseWriter, r *http.Request) {
			if id, ok := a.id(w, r.PathValue("id")); ok {
				c, err := a.CardOf(r.Context(), id)
				answer(a, w, c, err)
			}
		}},
		{pattern: "GET " + AdminLogons + "/{id}", handler: func(w http.ResponseWriter, r *http.Request) {
			if id, ok := a.id(w, r.PathValue("id")); ok {
				list, err := a.Logons(r.Context(), id)
				answer(a, w, list, err)
			}
		}},
	}
}

func (a *admin) addCardPermit(w http.ResponseWriter, r *http.Request) {
	signed, ok := a.approval(w, r)
	if !ok {
		return
	}
	p, err := a.AddCardPermit(r.Context(), signed)
	switch {
	case errors.Is(err, approval.ErrNotApproved):
		a.log.Warn("card permit refused", "id", signed.ID(), "error", err)
		a.fail(w, http.StatusForbidden, err)
	case err != nil:
		a.fail(w, http.StatusBadRequest, err)
	default:
		a.log.Warn("card permit accepted", "id", p.ID, "device", p.Permit.Device, "user", p.Permit.User, "do", p.Permit.Do, "signers", p.Signers, "reason", p.Permit.Reason)
		reply(w, http.StatusOK, p)
	}
}

// AddCardPermit presents a signed card permit, in JSON.
func (a *Admin) AddCardPermit(ctx context.Context, signed []byte) (p CardPermit, err error) {
	return p, a.do(ctx, http.MethodPost, AdminCards, signed, &p)
}

// Card returns what is known of a device's smart card.
func (a *Admin) Card(ctx context.Context, device string) (c Card, err error) {
	return c, a.do(ctx, http.MethodGet, AdminCards+"/"+url.PathEscape(device), nil, &c)
}

// Logons lists the events of a device's smart card, the newest last.
func (a *Admin) Logons(ctx context.Context, device string) (list []attest.LogonEvent, err error) {
	return list, a.do(ctx, http.MethodGet, AdminLogons+"/"+url.PathEscape(device), nil, &list)
}
