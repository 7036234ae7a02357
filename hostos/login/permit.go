package login

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/gate"
)

// permit.go is the card's line to the organisation: logons go to the audit,
// and what administrators have permitted comes back. A verifier carries both;
// it can hold a permit back, not make one: the approvers' keys are part of the
// image.

const (
	reportEvery = 2 * time.Minute  // asking for permits without news
	reportAgain = 10 * time.Second // after a verifier did not answer
)

// Failed is why a permitted action was not done.
const Failed Reason = "failed"

// Reporter hands news of the card to a verifier; *gate.Client has it.
type Reporter interface {
	ReportLogon(context.Context, attest.LogonNews) (attest.LogonAnswer, error)
}

// UsedPermit is a permit that was used and could come again until it expires.
type UsedPermit struct {
	ID      string    `json:"id"`
	Expires time.Time `json:"expires"`
}

// Report hands events to a verifier as they come, and does what permits say,
// until ctx ends. Nothing is sent while the gate for logon is shut.
func (e *Engine) Report(ctx context.Context, r Reporter) error {
	for ctx.Err() == nil {
		wait := reportEvery
		if err := e.report(ctx, r); err != nil && ctx.Err() == nil {
			e.Log.Warn("logon report", "error", err)
			wait = reportAgain
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-e.news:
		case <-timer.C:
		}
		timer.Stop()
	}
	return nil
}

// hasNews wakes Report.
func (e *Engine) hasNews() {
	select {
	case e.news <- struct{}{}:
	default: // it will look anyway
	}
}

func (e *Engine) report(ctx context.Context, r Reporter) error {
	e.mu.Lock()
	_, open := gate.Open(e.attested, gate.Logon, e.Now())
	e.mu.Unlock()
	if !open {
		return nil
	}
	st := e.store.get()
	var n attest.LogonNews
	for _, ev := range st.Events {
		if ev.Number > st.Stored {
			n.Events = append(n.Events, ev.audit())
		}
	}
	var err error
	if n.Request, err = e.wanted(ctx, st); err != nil {
		return err
	}
	answer, err := r.ReportLogon(ctx, n)
	if err != nil {
		return err
	}
	if answer.Stored > st.Stored {
		if err := e.store.change(ctx, func(s *State) { s.Stored = answer.Stored }); err != nil {
			return err
		}
	}
	for _, p := range answer.Permits {
		if err := e.permit(ctx, p); err != nil {
			e.Log.Warn("permit", "error", err)
		}
	}
	return nil
}

// wanted is the certificate request of a card that has no certificate: the
// same one each time, for a signature of ECDSA is never the same twice.
func (e *Engine) wanted(ctx context.Context, st State) ([]byte, error) {
	if st.Key == nil || len(st.Chain) > 0 {
		return nil, nil
	}
	if e.request == nil || e.requestOf != st.GUID {
		req, err := e.Request(ctx)
		if err != nil {
			return nil, err
		}
		if e.request, err = json.Marshal(req); err != nil {
			return nil, err
		}
		e.requestOf = st.GUID
	}
	return e.request, nil
}

// permit does what a permit says, once. It has to prove: enough of the
// organisation's approvers have signed it, for this laptop, this card's user
// and this time.
func (e *Engine) permit(ctx context.Context, data []byte) error {
	signed, err := approval.Parse(data)
	if err != nil {
		return err
	}
	payload, who, err := e.Approvers.Verify(attest.ApproveCard, signed)
	if err != nil {
		return err
	}
	p, err := attest.ParseCardPermit(payload)
	if err != nil {
		return err
	}
	st, now := e.store.get(), e.Now()
	id := signed.ID().String()
	if slices.ContainsFunc(st.Used, func(u UsedPermit) bool { return u.ID == id }) {
		return nil
	}
	var device attest.Digest
	e.mu.Lock()
	text := e.attested.DeviceID
	e.mu.Unlock()
	if err := device.UnmarshalText([]byte(text)); err != nil {
		return fmt.Errorf("this device's id: %w", err)
	}
	if err := p.InForce(device, now); err != nil {
		return err
	}
	if p.Do != attest.CardSetup && p.User != st.User {
		return fmt.Errorf("card permit: for the card of %q, this is that of %q", p.User, st.User)
	}
	e.Log.Warn("permit", "id", id, "do", string(p.Do), "user", p.User, "signers", who, "reason", p.Reason)
	use := func() error {
		return e.store.change(ctx, func(s *State) {
			s.Used = slices.DeleteFunc(slices.Clone(s.Used), func(u UsedPermit) bool { return !now.Before(u.Expires) })
			s.Used = append(s.Used, UsedPermit{id, p.Expires})
		})
	}
	// An enrolment needs a person, who may not be there yet: until the permit
	// expires it is begun again. All else is done once, whatever comes of it.
	if p.Do == attest.CardEnrol {
		short, cancel := context.WithTimeout(ctx, enrolTime)
		defer cancel()
		if err = e.Enrol(short, p.Finger); err != nil {
			return err
		}
		err = use()
	} else if err = use(); err == nil {
		err = e.permitted(ctx, p)
	}
	why := Open
	if err != nil {
		why = Failed
	}
	what := string(p.Do)
	switch p.Do {
	case attest.CardEnrol, attest.CardDelete:
		what += " " + p.Finger
	case attest.CardPINOnly:
		what += fmt.Sprintf(" %d minutes", p.Minutes)
	}
	e.record(ctx, Event{Slot: what, Reason: why, Permit: id})
	return err
}

// permitted does what a permit says at once.
func (e *Engine) permitted(ctx context.Context, p attest.CardPermit) error {
	switch p.Do {
	case attest.CardSetup:
		_, err := e.Setup(ctx, p.User, p.Name)
		return err
	case attest.CardImport:
		return e.Import(ctx, []byte(p.Chain))
	case attest.CardPIN:
		return errors.Join(e.count.Limit(e.Policy.PINTries), e.count.SetHash(*p.PIN))
	case attest.CardUnblock:
		return e.count.Limit(e.Policy.PINTries)
	case attest.CardDelete:
		return e.DeleteFinger(ctx, p.Finger)
	case attest.CardPINOnly:
		return e.AllowPINOnly(ctx, e.Now().Add(time.Duration(p.Minutes)*time.Minute))
	}
	return fmt.Errorf("card permit: action %q", p.Do)
}
