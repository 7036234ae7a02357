package fleet

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog/second"
	"sekisho/attest/tpm"
	"sekisho/attest/verifier"
)

const (
	enrolLife  = 5 * time.Minute // from challenge to answer
	maxPending = 1024            // enrolments under way
	maxResults = 256             // results kept for the admin
	maxTicket  = 128             // bytes of a ticket
	maxUses    = 100000          // of one ticket
	maxLife    = 90 * 24 * time.Hour
)

// Config is what a Service is made of. All fields are needed but References.
type Config struct {
	Verifier   string // our name, as in our server certificate
	Store      Store
	Issuer     *verifier.Issuer
	EKRoots    *ek.Roots
	References []attest.ReferenceValues // beside those of the store
	Now        func() time.Time

	Organization string        // whose verifier we are, in results
	Lifetime     time.Duration // of certificates, in results
	Policies     *Policies     // nil: unsigned reference values decide
	Reports      *Reports      // nil: no reports and no signed results
	Brake        *Brake        // nil: mass refusals are not noticed
	Commons      *Commons      // nil: firmware is not counted
	Log          *slog.Logger  // nil: nothing is logged

	// NonceKey is shared by the organisation's verifiers; zero: a new one.
	NonceKey [verifier.NonceKeySize]byte

	// Approvers may permit what a ticket does not; nil: nobody may.
	Approvers *approval.Approvers
}

// Service enrols and attests devices. It is safe for concurrent use.
type Service struct {
	Config
	nonces *verifier.Nonces

	mu      sync.Mutex
	pending map[string]pending // by session
	results []attest.Result    // newest last, in memory only

	logs second.Memory

	// Devices whose last evidence was refused for a clock that is not safe.
	unsafe map[attest.Digest]bool
}

// pending is an enrolment between begin and finish.
type pending struct {
	proof   []byte
	device  Device
	ticket  attest.Digest // SHA-256 of its text
	expires time.Time
}

// NewService returns a Service.
func NewService(c Config) (*Service, error) {
	if c.Verifier == "" || len(c.Verifier) > attest.MaxName {
		return nil, fmt.Errorf("verifier id %.64q: want 1 to %d bytes", c.Verifier, attest.MaxName)
	}
	if c.NonceKey == ([verifier.NonceKeySize]byte{}) {
		rand.Read(c.NonceKey[:])
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{Config: c, unsafe: make(map[attest.Digest]bool), nonces: verifier.NewNonces(c.Verifier, c.NonceKey, c.Now()), pending: make(map[string]pending)}, nil
}

// CreateTicket makes a ticket for uses enrolments within life and returns its
// text, which is shown this once.
func (s *Service) CreateTicket(uses int, life time.Duration) (attest.Ticket, Ticket, error) {
	if uses < 1 || uses > maxUses || life <= 0 || life > maxLife {
		return attest.Ticket{}, Ticket{}, fmt.Errorf("ticket for %d uses within %s: want 1 to %d uses within at most %s", uses, life, maxUses, maxLife)
	}
	var random [20]byte
	rand.Read(random[:])
	text := "ticket-" + strings.ToLower(base32.StdEncoding.EncodeToString(random[:]))
	digest := attest.Digest(sha256.Sum256([]byte(text)))
	t := Ticket{ID: ticketID(digest), Digest: digest, Uses: uses, Expires: s.Now().Add(life).UTC().Truncate(time.Second)}
	err := s.Store.Update(func(r *Registry) error {
		r.Tickets[t.ID] = t
		return nil
	})
	return attest.NewTicket(text), t, err
}

func ticketID(d attest.Digest) string { return d.String()[:16] }

// findTicket returns the registry's ticket with that text.
func findTicket(r *Registry, digest attest.Digest) (Ticket, error) {
	t, ok := r.Tickets[ticketID(digest)]
	if !ok || !hmac.Equal(t.Digest[:], digest[:]) {
		return Ticket{}, attest.Refuse(attest.ReasonTicketUnknown, "ticket is not known here; ask for a new one")
	}
	return t, nil
}

func (t Ticket) valid(now time.Time) error {
	switch {
	case now.After(t.Expires):
		return attest.Refuse(attest.ReasonTicketExpired, "ticket %s expired at %s; ask for a new one", t.ID, t.Expires.Format(time.RFC3339))
	case t.Uses < 1:
		return attest.Refuse(attest.ReasonTicketUsed, "ticket %s is used up; ask for a new one", t.ID)
	}
	return nil
}

// admit judges whether d may enrol by its ticket or the purchase list, and
// returns that entry. known: d is enrolled already with exactly these keys, so
// nothing is left to do.
func admit(r *Registry, d Device, ticket attest.Digest, now time.Time) (e entry, known bool, err error) {
	if e, err = r.entry(d, ticket); err != nil {
		return e, false, err
	}
	// A device whose power failed between our answer and its own record comes
	// again with the same keys; any other key under the same identity is a
	// takeover, unless it has a permit.
	if old, ok := r.Devices[d.ID]; ok && bytes.Equal(old.EK, d.EK) && bytes.Equal(old.AK, d.AK) {
		return e, true, nil
	}
	if err := r.mayTake(d, now); err != nil {
		return e, false, err
	}
	return e, false, e.valid(now)
}

// Begin judges an enrolment request and returns the challenge that only the
// genuine TPM can answer. Nothing is stored. Errors of judgement are
// *attest.Refusal.
func (s *Service) Begin(r attest.EnrolRequest) (*attest.EnrolChallenge, error) {
	now := s.Now()
	if len(r.Ticket) > maxTicket {
		return nil, attest.Refuse(attest.ReasonTicketUnknown, "ticket of %d bytes", len(r.Ticket))
	}
	endorsement, err := tpm.ParsePublic(r.EK)
	if err != nil {
		return nil, attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	ak, err := tpm.ParsePublic(r.AK)
	if err != nil {
		return nil, attest.Refuse(attest.ReasonAKAttributes, "attestation key: %v", err)
	}
	d := Device{ID: attest.DeviceID(endorsement.Name()), EK: r.EK, EKCertificate: r.EKCertificate, AK: r.AK}
	ticket := attest.Digest(sha256.Sum256([]byte(r.Ticket)))
	if d.TicketID = ticketID(ticket); r.Ticket == "" {
		d.TicketID = purchased
	}
	// The ticket comes first: without one, nobody makes us compute.
	if err := s.Store.View(func(reg *Registry) error {
		_, _, err := admit(reg, d, ticket, now)
		return err
	}); err != nil {
		return nil, err
	}
	if err := ak.CheckAK(); err != nil {
		return nil, attest.Refuse(attest.ReasonAKAttributes, "%v", err)
	}
	if err := ek.Check(endorsement, r.EKCertificate, s.EKRoots, now); err != nil {
		return nil, err
	}
	secret, session := make([]byte, 32), make([]byte, 16)
	rand.Read(secret)
	rand.Read(session)
	blob, enc, err := tpm.MakeCredential(endorsement, ak.Name(), secret)
	if err != nil {
		return nil, attest.Refuse(attest.ReasonEKAttributes, "%v", err)
	}
	c := attest.EnrolChallenge{Session: session, Verifier: s.Verifier, Credential: blob, Secret: enc}
	proof, err := attest.EnrolProof(secret, r, c)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.pending {
		if now.After(p.expires) {
			delete(s.pending, id)
		}
	}
	if len(s.pending) >= maxPending {
		return nil, attest.Refuse(attest.ReasonBusy, "%d enrolments are under way; try again", maxPending)
	}
	s.pending[string(session)] = pending{proof, d, ticket, now.Add(enrolLife)}
	return &c, nil
}

// Finish enrols the device if it has answered the challenge. A challenge can
// be answered once.
func (s *Service) Finish(a attest.EnrolAnswer) (*attest.Enrolment, error) {
	now := s.Now()
	s.mu.Lock()
	p, ok := s.pending[string(a.Session)]
	delete(s.pending, string(a.Session))
	s.mu.Unlock()
	switch {
	case !ok || now.After(p.expires):
		return nil, attest.Refuse(attest.ReasonChallengeExpired, "no such enrolment under way; begin again")
	case !hmac.Equal(p.proof, a.Proof):
		return nil, attest.Refuse(attest.ReasonChallengeFailed, "the device could not prove that its keys are in the TPM it shows")
	}
	d := p.device
	d.Enrolled = now.UTC().Truncate(time.Second)
	err := s.Store.Update(func(r *Registry) error {
		e, known, err := admit(r, d, p.ticket, now)
		if err != nil {
			return err
		}
		if known {
			d = r.Devices[d.ID]
			return nil
		}
		e.use()
		r.take(d, now.UTC().Truncate(time.Second))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &attest.Enrolment{Device: d.ID, Verifier: s.Verifier, Enrolled: d.Enrolled}, nil
}

// Challenge gives a nonce to whoever asks: whether the device is enrolled is
// said only to those who hold its key.
func (s *Service) Challenge(r attest.ChallengeRequest) attest.Challenge {
	return attest.Challenge{Nonce: s.nonces.New(r.Device, s.Now()), Verifier: s.Verifier}
}

// Attest appraises encoded evidence. An error means that no appraisal took
// place; a refusal is a response. Only an affirming result changes the store.
func (s *Service) Attest(data []byte) (*attest.AttestResponse, error) {
	now := s.Now().Truncate(time.Second)
	resp, err := s.appraise(data, now)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if len(s.results) == maxResults {
		s.results = s.results[1:]
	}
	s.results = append(s.results, resp.Result)
	s.mu.Unlock()
	return resp, nil
}

// Results returns the last results, oldest first. Refusals are kept in memory
// only.
func (s *Service) Results() []attest.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]attest.Result(nil), s.results...)
}
