package login

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
	"sekisho/hostos/login/piv"
	"sekisho/hostos/login/vscard"
)

// TouchTime is how long a command of the card waits for a finger unless Config
// says otherwise. It is less than the waiting time that the card's answer to
// reset asks for.
const TouchTime = 11 * time.Second

// Finger is the fingerprint reader; *fprint.Reader has it.
type Finger interface {
	Verify(ctx context.Context, user string, tell func(fprint.Feedback)) error
}

// Config is what an Engine is made of.
type Config struct {
	Policy    attest.Logon
	Approvers *approval.Approvers // whose permits count; nil: nobody's
	Agency    string              // the organisation's name
	Attestd   Attestd
	Disk      Disk
	Touch     time.Duration // 0 is TouchTime
	Now       func() time.Time
	Log       *slog.Logger
}

// Engine is the card with its gate. Its methods are safe for concurrent use;
// Run is called once.
type Engine struct {
	Config
	store *store
	pin   piv.Verifier
	count *piv.PIN // the PIN's counter, also where none is wanted
	card  *piv.Card
	Slot  *vscard.Slot
	news  chan struct{} // wakes Report

	request   []byte   // of Report alone: the certificate request of
	requestOf [16]byte // this card

	mu       sync.Mutex
	attested gate.Status
	finger   time.Time // of a match that was not used yet
	reader   Finger    // nil while there is none
	say      Say
	timer    *time.Timer   // of the result's lapse, nil while there is none
	change   chan struct{} // closed at the next change
}

// Say is what is shown to the person at the laptop.
type Say struct {
	Feedback fprint.Feedback
	Since    time.Time
}

// New loads the state and returns a card that is not in the reader.
func New(ctx context.Context, c Config) (*Engine, error) {
	if c.Touch == 0 {
		c.Touch = TouchTime
	}
	e := &Engine{Config: c, store: &store{disk: c.Disk}, change: make(chan struct{}), news: make(chan struct{}, 1)}
	if err := e.store.load(ctx); err != nil {
		return nil, err
	}
	var err error
	if e.count, err = piv.OpenPIN(e.store); err != nil {
		return nil, err
	}
	e.pin = e.count
	if !c.Policy.PIN {
		e.pin = optionalPIN{e}
	}
	p, err := e.store.get().profile(c.Agency, c.Now())
	if err != nil {
		return nil, err
	}
	if e.card, err = piv.New(p, e, auditedPIN{e.pin, e}, c.Now); err != nil {
		return nil, err
	}
	if e.Slot, err = vscard.NewSlot(e.card, piv.ATR()); err != nil {
		return nil, err
	}
	return e, nil
}

// auditedPIN records PINs that were wrong.
type auditedPIN struct {
	piv.Verifier
	e *Engine
}

func (a auditedPIN) Verify(pin []byte) error {
	err := a.Verifier.Verify(pin)
	switch {
	case errors.Is(err, piv.ErrPIN):
		a.e.record(context.Background(), Event{Slot: "PIN", Reason: PINWrong})
	case errors.Is(err, piv.ErrBlocked):
		a.e.record(context.Background(), Event{Slot: "PIN", Reason: PINBlocked})
	}
	return err
}

// optionalPIN takes any PIN while fingers do, and the right one while a permit
// has it stand alone.
type optionalPIN struct{ e *Engine }

func (o optionalPIN) now() piv.Verifier {
	if o.e.Now().Before(o.e.store.get().PINOnly) {
		return o.e.count
	}
	return piv.NoPIN{}
}

func (o optionalPIN) Verify(pin []byte) error { return o.now().Verify(pin) }
func (o optionalPIN) Set(pin []byte) error    { return o.now().Set(pin) }
func (o optionalPIN) Left() int               { return o.now().Left() }

// Run follows attestation until ctx ends: the card is in the reader while the
// gate for logon is open, and out of it at once when that shuts.
func (e *Engine) Run(ctx context.Context) error {
	defer e.Slot.Remove()
	var version uint64
	for ctx.Err() == nil {
		s, err := e.Attestd.Wait(ctx, version)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			e.Log.Warn("attestd", "error", err)
			s = gate.Status{} // nothing is known, so the gate is shut
			e.attest(s)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		version = s.Version
		e.attest(s)
	}
	return nil
}

// attest takes over a status of attestation.
func (e *Engine) attest(s gate.Status) {
	e.mu.Lock()
	e.attested = s
	e.mu.Unlock()
	e.place()
	e.hasNews()
}

// place puts the card in or takes it out. A lapse needs no news to come: the
// timer of lapse calls it too.
func (e *Engine) place() {
	e.mu.Lock()
	until, open := gate.Open(e.attested, gate.Logon, e.Now())
	if !open {
		e.finger = time.Time{}
	}
	e.publish()
	e.mu.Unlock()
	if !open || len(e.store.get().Chain) == 0 {
		e.Slot.Remove()
		return
	}
	e.Slot.Insert()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timer != nil {
		e.timer.Stop()
	}
	e.timer = time.AfterFunc(until.Sub(e.Now())+time.Millisecond, e.lapse)
}

// lapse takes the card out if the result has lapsed meanwhile.
func (e *Engine) lapse() {
	e.mu.Lock()
	_, open := gate.Open(e.attested, gate.Logon, e.Now())
	e.mu.Unlock()
	if !open {
		e.place()
	}
}

// publish wakes who waits for a change. e.mu is held.
func (e *Engine) publish() {
	close(e.change)
	e.change = make(chan struct{})
}

// SetReader tells of the fingerprint reader, or with nil that there is none.
func (e *Engine) SetReader(r Finger) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reader = r
	e.publish()
}

// tell notes what the person is told.
func (e *Engine) tell(f fprint.Feedback) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.say = Say{f, e.Now()}
	e.publish()
}

// facts gathers what the gate knows.
func (e *Engine) facts(pin bool) Facts {
	st := e.store.get()
	e.mu.Lock()
	defer e.mu.Unlock()
	return Facts{
		Policy: e.Policy, Attestation: e.attested, PIN: pin, PINLeft: e.pin.Left(),
		Finger: e.finger, Locked: st.Locked, PINOnly: st.PINOnly,
	}
}

// Use is the card's private key operation: through the gate, then by the TPM.
func (e *Engine) Use(ctx context.Context, slot piv.Slot, op piv.Operation, input []byte, pin bool) ([]byte, error) {
	st := e.store.get()
	if slot != piv.Authentication || st.Key == nil {
		return nil, e.refuse(ctx, slot, NotSet)
	}
	reason := Decide(e.facts(pin), e.Now())
	if reason == FingerWanted {
		if why := e.touch(ctx, st.User); why != Open {
			return nil, e.refuse(ctx, slot, why)
		}
		reason = Decide(e.facts(pin), e.Now())
	}
	if reason != Open {
		return nil, e.refuse(ctx, slot, reason)
	}
	factor := e.factor()
	e.mu.Lock()
	e.finger = time.Time{} // for this operation, whatever comes of it
	e.mu.Unlock()
	out, err := e.Attestd.UseLogonKey(ctx, gate.UseLogonKey{Key: st.Key.Key, Operation: operations[op], Input: input})
	if err != nil {
		e.Log.Error("the key was not used", "error", err)
		if errors.Is(err, gate.ErrShut) {
			return nil, e.refuse(ctx, slot, NotAttested)
		}
		return nil, err
	}
	e.record(ctx, Event{Slot: slot.String(), Factor: factor, Reason: Open})
	return out, nil
}

var operations = map[piv.Operation]attest.LogonOperation{
	piv.SignECDSA: attest.LogonSign, piv.RSA: attest.LogonRSA, piv.ECDH: attest.LogonECDH,
}

// factor says what opened the gate.
func (e *Engine) factor() string {
	only := e.Now().Before(e.store.get().PINOnly)
	switch {
	case !e.Policy.Finger || only:
		return "pin"
	case e.Policy.PIN:
		return "finger+pin"
	}
	return "finger"
}

// refuse records a refusal and is the card's answer.
func (e *Engine) refuse(ctx context.Context, slot piv.Slot, why Reason) error {
	e.record(ctx, Event{Slot: slot.String(), Reason: why})
	_, en := why.Words()
	return &piv.Refusal{Status: why.Status(), Why: en}
}

// record keeps an event for the audit, with what it happened under.
func (e *Engine) record(ctx context.Context, ev Event) {
	e.mu.Lock()
	ev.Result = e.attested.DeviceID + " until " + e.attested.NotAfter.UTC().Format(time.RFC3339)
	e.mu.Unlock()
	err := e.store.change(context.WithoutCancel(ctx), func(st *State) {
		ev.Time, ev.User, ev.Number = e.Now().UTC(), st.User, 1
		events := slices.Clone(st.Events)
		if n := len(events); n > 0 {
			ev.Number = events[n-1].Number + 1
		}
		events = append(events, ev)
		st.Events = events[max(0, len(events)-maxEvents):]
	})
	e.Log.Info("logon", "user", ev.User, "what", ev.Slot, "factor", ev.Factor, "reason", string(ev.Reason), "permit", ev.Permit)
	if err != nil {
		e.Log.Error("a logon was not recorded", "error", err)
	}
	e.hasNews()
}

// touch waits for a finger of user. Open: it matched.
func (e *Engine) touch(ctx context.Context, user string) Reason {
	ctx, cancel := context.WithTimeout(ctx, e.Touch)
	defer cancel()
	for {
		e.mu.Lock()
		reader := e.reader
		e.mu.Unlock()
		if reader == nil {
			return NoReader
		}
		switch err := reader.Verify(ctx, user, e.tell); {
		case err == nil:
			e.mu.Lock()
			e.finger = e.Now()
			e.publish()
			e.mu.Unlock()
			e.fingers(ctx, true)
			return Open
		case errors.Is(err, fprint.ErrNoMatch):
			if e.fingers(ctx, false) {
				return FingerLocked
			}
		case ctx.Err() != nil:
			e.tell(0)
			return FingerWanted
		case errors.Is(err, fprint.ErrNoPrints):
			return NotSet
		default:
			e.Log.Error("fingerprint reader", "error", err)
			return NoReader
		}
	}
}

// fingers counts touches in a row that did not match, and reports whether
// fingers are locked out now.
func (e *Engine) fingers(ctx context.Context, matched bool) (locked bool) {
	st := e.store.get()
	if matched && st.Failures == 0 {
		return false
	}
	err := e.store.change(context.WithoutCancel(ctx), func(st *State) {
		if matched {
			st.Failures = 0
			return
		}
		if st.Failures++; st.Failures >= e.Policy.FingerTries {
			st.Failures, st.Locked, locked = 0, e.Now().Add(e.Policy.Lock()), true
		}
	})
	if err != nil {
		e.Log.Error("the count of fingers was not kept", "error", err)
		return !matched // a count that cannot be kept stays closed
	}
	return locked
}
