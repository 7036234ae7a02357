// Package attester is the device side of attestation: it enrols with a ticket,
// attests, renews its credential at half life, and says at any time in one
// status how things stand. Nothing here opens a gate; gates read the status.
package attester

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// Waits between attempts that failed: full jitter over a doubling bound, so
// that a fleet that lost its verifier does not come back in step.
const (
	backoffFirst = time.Second
	backoffMax   = 30 * time.Second
)

// stepLimit is how long one step of an attempt may take: opening the TPM, where
// a discrete one may need most of a minute for an RSA key, or all that is done
// with one verifier, two requests of callTime and some TPM commands. Beyond it
// Run hangs, in a TPM command that never returns.
const stepLimit = 3 * time.Minute

// TPM is what the attester needs of a TPM; *tpm.TPM has it.
type TPM interface {
	Identity() tpm.Identity
	Activate(credential, secret []byte) ([]byte, error)
	Attest(extra attest.Digest) (*tpm.Proof, error)
}

// Storage keeps the record over boots; *State and StateFile have it.
type Storage interface {
	Load() (Record, error)
	Store(Record) error
	Erase() error
}

// Hardware is an open TPM that also measures, and signs with its credential
// key.
type Hardware interface {
	TPM
	Measurer
	crypto.Signer
	io.Closer
}

// Config is what an Attester is made of. All fields but RunLog, Model, Logon
// and Network are needed.
type Config struct {
	Organization *attest.Organization
	OpenTPM      func() (Hardware, error) // called again after a fault
	EventLog     func() ([]byte, error)
	RunLog       *RunLog // run-time events; nil records none
	Model        string  // of the machine, see Model
	State        Storage
	Logon        *Logon   // what logind may ask for; nil: nobody logs on
	Network      *Network // what netd may ask for; nil: no network is kept
	Now          func() time.Time
	Log          *slog.Logger
}

// Attester is the device side of attestation. Its methods are safe for
// concurrent use; Run is called once.
type Attester struct {
	Config
	remotes []*remote
	again   chan struct{} // a run-time event asks for a new quote

	// Of Run's goroutine alone.
	record   Record
	failures int
	away     time.Time // since when no verifier answers, zero if one does

	opening sync.Mutex // held while the TPM is opened or closed, and taken before mu
	volumes sync.Mutex // held while a volume is made or bound, and taken before opening

	mu     sync.Mutex
	step   time.Time // when Run began its present step, zero while it waits
	hw     Hardware
	device attest.Digest
	facts  Facts
	chain  []*x509.Certificate // credential, while one was given
	lapse  *time.Timer         // publishes at the credential's end
	making *seal.Unbound       // volume in the making
	offer  *offered            // release that a verifier offered
	status gate.Status
	change chan struct{} // closed at the next change of status
}

// New returns an Attester whose status is closed until Run has made it
// otherwise.
func New(c Config) (*Attester, error) {
	roots, err := c.Organization.Roots()
	if err != nil {
		return nil, err
	}
	a := &Attester{Config: c, change: make(chan struct{}), again: make(chan struct{}, 1)}
	for _, e := range c.Organization.Verifiers {
		a.remotes = append(a.remotes, newRemote(e, roots, c.Organization.KeyAgreement, c.Organization.Proxy))
	}
	// Until the first fact is known: closed, and no alarm yet.
	a.status = gate.Status{State: gate.StateAttesting, Since: c.Now().UTC(), Detail: "starting"}
	return a, nil
}

// Run attests until ctx ends.
func (a *Attester) Run(ctx context.Context) error {
	defer a.shut()
	for {
		wait := time.NewTimer(a.attempt(ctx))
		select {
		case <-ctx.Done():
			wait.Stop()
			return nil
		case <-a.again:
			wait.Stop()
		case <-wait.C:
		}
	}
}

// shut drops the credential and closes the TPM.
func (a *Attester) shut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.drop()
	if a.hw != nil {
		if err := a.hw.Close(); err != nil {
			a.Log.Warn("close TPM", "error", err)
		}
		a.hw = nil
	}
}

// attempt does the one next thing and returns how long to wait after it.
func (a *Attester) attempt(ctx context.Context) time.Duration {
	a.begin(a.Now())
	defer a.begin(time.Time{})
	err := a.advance(ctx)
	if ctx.Err() != nil {
		return 0
	}
	if err == nil {
		a.failures, a.away = 0, time.Time{}
		return a.settle(ctx)
	}
	a.fail(err)
	// Exactly when we are told, for others have their turns before and behind.
	if later, ok := errors.AsType[*busy](err); ok {
		return later.wait
	}
	bound := min(backoffMax, backoffFirst<<min(a.failures, 10))
	a.failures++
	return rand.N(bound)
}

// begin notes that a step begins, or with the zero time that none is under way.
func (a *Attester) begin(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.step = now
}

// hangs reports whether Run's step takes longer than any step can.
func (a *Attester) hangs() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.step.IsZero() && a.Now().Sub(a.step) > stepLimit
}

// settle publishes success and returns the wait until the next attempt: none
// after enrolment, else half the credential's life, a little less at random.
func (a *Attester) settle(context.Context) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.facts.Refused, a.facts.Unreachable = false, false
	a.publish(attest.ReasonNone, "")
	half := a.facts.NotAfter.Sub(a.Now()) / 2
	if half <= 0 {
		return 0
	}
	return half - rand.N(half/10+1)
}

// fault is an error of this machine, with its reason.
type fault struct {
	reason attest.Reason
	err    error
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

// fail publishes why the attempt did not succeed.
func (a *Attester) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var (
		refusal *attest.Refusal
		local   *fault
		away    *unreachable
		later   *busy
	)
	switch {
	case errors.As(err, &local):
		a.facts.Refused, a.facts.Unreachable = false, false
		a.publish(local.reason, local.Error())
	case errors.As(err, &refusal) && refusal.Reason != attest.ReasonBusy:
		a.facts.Refused, a.facts.Unreachable = true, false
		a.drop()
		a.publish(refusal.Reason, refusal.Detail)
	case errors.As(err, &away) || errors.As(err, &later) || errors.As(err, &refusal):
		if a.away.IsZero() {
			a.away = a.Now()
		}
		a.facts.Refused, a.facts.Unreachable = false, true
		a.publish(attest.ReasonUnreachable, fmt.Sprintf("%v (no answer since %s)", err, a.away.UTC().Format(time.RFC3339)))
	default:
		a.publish(attest.ReasonTPMFault, err.Error())
	}
}

// advance opens the TPM, enrols, or attests, whichever is next.
func (a *Attester) advance(ctx context.Context) error {
	if err := a.openTPM(); err != nil {
		return err
	}
	if err := a.loadRecord(); err != nil {
		return err
	}
	if a.record.Enrolment == nil {
		if a.record.Ticket.IsZero() {
			return a.withoutTicket(a.each(ctx, a.enrol))
		}
		return a.each(ctx, a.enrol)
	}
	return a.each(ctx, a.attest)
}

// spares is how many verifiers beside its own a device goes to.
const spares = 2

// order is in which order the device goes to the verifiers: each device in
// another one, so that a verifier's laptops spread over all others when it
// fails (rendezvous hashing), and the same one every time.
func (a *Attester) order() []*remote {
	weight := func(r *remote) [sha256.Size]byte {
		return sha256.Sum256([]byte(a.device.String() + " " + r.endpoint.Address.String()))
	}
	list := slices.SortedFunc(slices.Values(a.remotes), func(x, y *remote) int {
		p, q := weight(x), weight(y)
		return bytes.Compare(p[:], q[:])
	})
	return list[:min(len(list), 1+spares)]
}

// each tries f with one verifier after the other until one answers. One that
// is busy has answered: to go to the others would make them busy too. Only who
// would be without a credential by then does.
func (a *Attester) each(ctx context.Context, f func(context.Context, *remote) error) error {
	var errs []error
	for _, r := range a.order() {
		a.begin(a.Now())
		err := f(ctx, r)
		var away *unreachable
		later, isBusy := errors.AsType[*busy](err)
		if !errors.As(err, &away) && !(isBusy && later.wait > patience && a.without(later.wait)) {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// patience is how long a device without a credential waits for its turn with
// one verifier before it asks the next.
const patience = 20 * time.Second

// without reports whether the credential will have ended after a wait.
func (a *Attester) without(wait time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.Now().Add(wait).Before(a.facts.NotAfter)
}

// both is an error for people: English first, because the kernel's console has
// no glyphs for Japanese, the cause, then the same in Japanese.
func both(english, japanese string, cause error) error {
	return fmt.Errorf("%s: %w / %s", english, cause, japanese)
}

// openTPM opens the TPM unless it is open. It holds a.mu only to publish it:
// while the TPM makes its keys, the status must be there for whoever asks.
func (a *Attester) openTPM() error {
	a.opening.Lock()
	defer a.opening.Unlock()
	a.mu.Lock()
	opened := a.hw != nil
	a.mu.Unlock()
	if opened {
		return nil
	}
	hw, err := a.OpenTPM()
	switch {
	case errors.Is(err, tpm.ErrNoTPM):
		return &fault{attest.ReasonNoTPM, both("No TPM found; enable TPM 2.0 in the firmware setup", "TPM が見つかりません。ファームウェア設定で TPM 2.0 を有効にしてください。", err)}
	case errors.Is(err, fs.ErrPermission):
		return &fault{attest.ReasonTPMFault, both("No permission to open the TPM: init has not handed it to attestd; switch off and on again", "TPM を開く権限がありません。電源を入れ直してください。", err)}
	case err != nil:
		return &fault{attest.ReasonTPMFault, both("The TPM cannot be used", "TPM を使用できません。", err)}
	}
	ek, err := tpm.ParsePublic(hw.Identity().EK)
	if err != nil {
		return errors.Join(&fault{attest.ReasonTPMFault, err}, hw.Close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hw, a.device, a.facts.TPM = hw, attest.DeviceID(ek.Name()), true
	a.Log.Info("TPM opened", "device", a.device)
	return nil
}

// tpmFault closes the TPM after a command failed: the next attempt opens it
// anew, with a new credential key, so the credential goes.
func (a *Attester) tpmFault(err error) error {
	a.opening.Lock()
	defer a.opening.Unlock()
	a.mu.Lock()
	hw := a.hw
	a.drop()
	a.hw, a.facts.TPM = nil, false
	a.mu.Unlock()
	if hw != nil { // closing takes TPM commands, so without a.mu
		err = errors.Join(err, hw.Close())
	}
	return &fault{attest.ReasonTPMFault, err}
}

func stateFault(err error) error {
	return &fault{attest.ReasonState, both("The state partition cannot be used; check the disk or install it again", "状態パーティションを使用できません。ディスクを点検するか、再インストールしてください。", err)}
}

// loadRecord reads the state partition while it does not say that the device
// is enrolled: a ticket may be put there at any time.
func (a *Attester) loadRecord() error {
	if a.record.Enrolment != nil {
		return nil
	}
	r, err := a.State.Load()
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return stateFault(err)
	}
	if r.Enrolment != nil && r.Enrolment.Device != a.device {
		return &fault{attest.ReasonState, fmt.Errorf("enrolment on the state partition is of device %s, this TPM is device %s; put a new ticket there / 状態パーティションの登録は別の端末のものです。新しい登録チケットを書き込んでください。", r.Enrolment.Device, a.device)}
	}
	a.setRecord(r)
	return nil
}

func (a *Attester) setRecord(r Record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.record = r
	a.facts.Enrolled, a.facts.Ticket = r.Enrolment != nil, !r.Ticket.IsZero()
	if a.status.State != Next(a.facts, a.Now()) {
		a.publish(attest.ReasonNone, "")
	}
}

// enrol exchanges the ticket for an enrolment.
func (a *Attester) enrol(ctx context.Context, r *remote) error {
	id := a.hw.Identity()
	begin := attest.EnrolRequest{Ticket: a.record.Ticket.Reveal(), EKCertificate: id.EKCertificate, EK: id.EK, AK: id.AK}
	var c attest.EnrolChallenge
	if err := r.callJSON(ctx, attest.PathEnrolBegin, begin, &c); err != nil {
		return err
	}
	if err := r.isNamed(c.Verifier); err != nil {
		return err
	}
	secret, err := a.hw.Activate(c.Credential, c.Secret)
	if err != nil {
		return a.tpmFault(err)
	}
	proof, err := attest.EnrolProof(secret, begin, c)
	if err != nil {
		return err
	}
	var e attest.Enrolment
	if err := r.callJSON(ctx, attest.PathEnrolFinish, attest.EnrolAnswer{Session: c.Session, Proof: proof}, &e); err != nil {
		return err
	}
	if e.Device != a.device {
		return &unreachable{r.endpoint.Address.String(), fmt.Errorf("enrolled device %s instead of %s", e.Device, a.device)}
	}
	record := Record{Enrolment: &e}
	if err := errors.Join(a.State.Store(record), a.State.Erase()); err != nil {
		return stateFault(err)
	}
	a.setRecord(record)
	a.Log.Info("enrolled", "device", e.Device, "verifier", e.Verifier)
	return nil
}

// attest presents evidence and installs the credential it is given.
func (a *Attester) attest(ctx context.Context, r *remote) error {
	log, err := a.EventLog()
	if err != nil {
		return &fault{attest.ReasonTPMFault, err}
	}
	var c attest.Challenge
	if err := r.callJSON(ctx, attest.PathChallenge, attest.ChallengeRequest{Device: a.device, Ticket: r.ticket}, &c); err != nil {
		return err
	}
	r.ticket = nil
	if err := r.isNamed(c.Verifier); err != nil {
		return err
	}
	data, err := a.evidence(c, log)
	if err != nil {
		return err
	}
	var answer attest.AttestResponse
	if err := r.call(ctx, attest.PathAttest, attest.ContentType, data, &answer); err != nil {
		return err
	}
	res := answer.Result
	if res.Status != attest.StatusAffirming {
		if res.Status == attest.StatusNone || res.Reason == attest.ReasonNone {
			return &unreachable{r.endpoint.Address.String(), errors.New("answered without a verdict")}
		}
		return &attest.Refusal{Reason: res.Reason, Detail: res.Detail}
	}
	if string(res.Nonce) != string(c.Nonce) {
		return &unreachable{r.endpoint.Address.String(), errors.New("answered for another nonce")}
	}
	if err := a.install(answer.Chain); err != nil {
		return &unreachable{r.endpoint.Address.String(), err}
	}
	return nil
}

// evidence answers the challenge.
func (a *Attester) evidence(c attest.Challenge, log []byte) ([]byte, error) {
	id := a.hw.Identity()
	key, err := tpm.ParsePublic(id.Key)
	if err != nil {
		return nil, a.tpmFault(err)
	}
	spki, err := key.SPKI()
	if err != nil {
		return nil, a.tpmFault(err)
	}
	// No event may come between its log and the quote.
	run, done, err := a.RunLog.hold(a.hw)
	if err != nil {
		return nil, a.tpmFault(err)
	}
	defer done()
	binding := attest.Binding{
		Nonce: c.Nonce, Device: a.device, Verifier: c.Verifier, Purpose: attest.PurposeNetwork,
		Key: sha256.Sum256(spki), EventLog: sha256.Sum256(log), RunLog: run, Model: a.Model,
	}
	extra, err := binding.Digest()
	if err != nil {
		return nil, err
	}
	proof, err := a.hw.Attest(extra)
	if err != nil {
		return nil, a.tpmFault(err)
	}
	e := attest.Evidence{
		Profile: attest.Profile, Device: a.device[:], Verifier: c.Verifier, Purpose: binding.Purpose, Nonce: c.Nonce,
		Quote: proof.Quote, QuoteSig: proof.QuoteSig, PCRs: make(map[int][]byte, len(proof.PCRs)), EventLog: log,
		Key: id.Key, Certify: proof.Certify, CertifySig: proof.CertifySig, RunLog: run, Model: a.Model,
	}
	for i, v := range proof.PCRs {
		e.PCRs[i] = v[:]
	}
	return e.Encode()
}

// install puts a credential in force, if it is one for our key.
func (a *Attester) install(der [][]byte) error {
	if len(der) == 0 || len(der) > 4 {
		return fmt.Errorf("credential of %d certificates", len(der))
	}
	chain := make([]*x509.Certificate, len(der))
	for i, d := range der {
		c, err := x509.ParseCertificate(d)
		if err != nil {
			return fmt.Errorf("credential: %w", err)
		}
		chain[i] = c
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if pub, ok := a.hw.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(chain[0].PublicKey) {
		return errors.New("credential is for another key")
	}
	life := chain[0].NotAfter.Sub(a.Now())
	if life <= 0 {
		return fmt.Errorf("credential lapsed at %s already; is this machine's clock right?", chain[0].NotAfter.Format(time.RFC3339))
	}
	a.drop()
	a.chain, a.facts.NotAfter = chain, chain[0].NotAfter
	a.lapse = time.AfterFunc(life, a.lapsed)
	return nil
}

// drop takes the credential out of force. a.mu is held.
func (a *Attester) drop() {
	if a.lapse != nil {
		a.lapse.Stop()
	}
	a.chain, a.lapse, a.facts.NotAfter = nil, nil, time.Time{}
}

// lapsed publishes the end of a credential that was not renewed in time.
func (a *Attester) lapsed() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.chain == nil || a.Now().Before(a.facts.NotAfter) {
		return
	}
	a.drop()
	reason, detail := attest.ReasonNone, a.status.Detail
	if a.facts.Unreachable {
		reason = attest.ReasonUnreachable
	}
	a.publish(reason, detail)
}

// isNamed checks that a verifier calls itself what its certificate says: the
// name goes into the quote, so that no verifier can pass our answer on.
func (r *remote) isNamed(name string) error {
	if name != r.endpoint.ServerName {
		return &unreachable{r.endpoint.Address.String(), fmt.Errorf("verifier calls itself %.64q but its certificate is for %q; set its id to that", name, r.endpoint.ServerName)}
	}
	return nil
}
