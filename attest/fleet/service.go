package fleet

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/auditlog"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog/second"
	"sekisho/attest/policy"
	"sekisho/attest/store"
	"sekisho/attest/tpm"
	"sekisho/attest/verifier"
)

const (
	enrolLife  = 5 * time.Minute // from challenge to answer
	maxPending = 1024            // enrolments under way
	maxSession = 64              // bytes of a session's name
	maxResults = 256             // results kept for the admin
	maxTicket  = 128             // bytes of a ticket
	maxUses    = 100000          // of one ticket
	maxLife    = 90 * 24 * time.Hour
)

// Config is what a Service is made of. All fields are needed but References.
type Config struct {
	Verifier string // our name, as in our server certificate
	// Organization is whose verifier we are: in results, and where its records
	// are in the store.
	Organization string
	Store        *store.Store
	Issuer       *verifier.Issuer
	EKRoots      *ek.Roots
	References   []attest.ReferenceValues // beside those of the store
	Now          func() time.Time

	Lifetime   time.Duration   // of certificates, in results
	PolicyKeys *policy.Keyring // nil: unsigned reference values decide
	Reports    *Reports        // nil: no reports and no signed results
	Audit      *auditlog.Log   // of the reports; nil: none is kept
	Brake      *Brake          // nil: mass refusals are not noticed
	Gateways   *x509.CertPool  // whose clients may hear of revocations; nil: nobody
	Escrows    bool            // recovery keys are kept
	// NetworkIssuer certifies laptops' network identities; nil: they get none.
	NetworkIssuer *verifier.NetworkIssuer
	Images        string       // directory of the releases' images; empty: none are kept
	Log           *slog.Logger // nil: nothing is logged

	// NonceKey is shared by the organisation's verifiers; zero: a new one.
	NonceKey [verifier.NonceKeySize]byte

	// Approvers may permit what a ticket does not; nil: nobody may.
	Approvers *approval.Approvers
}

// Service enrols and attests devices. It is safe for concurrent use.
type Service struct {
	Config
	Policies *Policies // nil: unsigned reference values decide
	Commons  *Commons

	keys    keys
	nonces  *verifier.Nonces
	shared  *shared
	count   counter
	logs    second.Memory
	ramp    *ramp
	metrics *metrics
	mu      sync.Mutex
	results []attest.Result // newest last; of those before the start, what has a report
}

// pending is an enrolment between begin and finish.
type pending struct {
	Proof   []byte        `json:"proof"` // secret until it was answered
	Device  Device        `json:"device"`
	Ticket  attest.Digest `json:"ticket"` // SHA-256 of its text
	Expires time.Time     `json:"expires"`
}

// NewService returns a Service, which follows the changes that other verifiers
// make until Close.
func NewService(ctx context.Context, c Config) (*Service, error) {
	if c.Verifier == "" || len(c.Verifier) > attest.MaxName {
		return nil, fmt.Errorf("verifier id %.64q: want 1 to %d bytes", c.Verifier, attest.MaxName)
	}
	if c.Organization == "" || len(c.Organization) > attest.MaxName {
		return nil, fmt.Errorf("organisation %.64q: want 1 to %d bytes", c.Organization, attest.MaxName)
	}
	if c.NonceKey == ([verifier.NonceKeySize]byte{}) {
		rand.Read(c.NonceKey[:])
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Service{Config: c, keys: keysOf(c.Organization), nonces: verifier.NewNonces(c.Verifier, c.NonceKey)}
	s.Commons = newCommons(c.Organization)
	if c.PolicyKeys != nil {
		s.Policies = newPolicies(c.Organization, c.PolicyKeys)
	}
	if s.Reports != nil {
		var err error
		if s.results, err = s.Reports.results(maxResults); err != nil {
			return nil, err
		}
	}
	if err := s.follow(ctx); err != nil {
		return s, err
	}
	s.ramp = newRamp(s.NonceKey, s.Now)
	s.metrics = newMetrics(s)
	return s, nil
}

// Close ends what NewService began. The store stays open.
func (s *Service) Close() { s.shared.Close() }

// CreateTicket makes a ticket for uses enrolments within life and returns its
// text, which is shown this once.
func (s *Service) CreateTicket(ctx context.Context, uses int, life time.Duration) (attest.Ticket, Ticket, error) {
	if uses < 1 || uses > maxUses || life <= 0 || life > maxLife {
		return attest.Ticket{}, Ticket{}, fmt.Errorf("ticket for %d uses within %s: want 1 to %d uses within at most %s", uses, life, maxUses, maxLife)
	}
	var random [20]byte
	rand.Read(random[:])
	text := "ticket-" + strings.ToLower(base32.StdEncoding.EncodeToString(random[:]))
	digest := attest.Digest(sha256.Sum256([]byte(text)))
	t := Ticket{ID: ticketID(digest), Digest: digest, Uses: uses, Expires: s.Now().Add(life).UTC().Truncate(time.Second)}
	_, err := s.Store.Update(ctx, func(x concurrency.STM) error { return write(x, s.keys.ticket(t.ID), t) })
	return attest.NewTicket(text), t, err
}

func ticketID(d attest.Digest) string { return d.String()[:16] }

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
// returns that entry. known, if not nil, is the record of d: it is enrolled
// already with exactly these keys, so nothing is left to do.
func (s *Service) admit(t concurrency.STM, d Device, ticket attest.Digest, now time.Time) (e entry, known *Device, err error) {
	if e, err = s.entry(t, d, ticket); err != nil {
		return e, nil, err
	}
	// A device whose power failed between our answer and its own record comes
	// again with the same keys; any other key under the same identity is a
	// takeover, unless it has a permit.
	old, ok, err := read[Device](t, s.keys.device(d.ID))
	if err != nil {
		return e, nil, err
	}
	if ok && bytes.Equal(old.EK, d.EK) && bytes.Equal(old.AK, d.AK) {
		return e, &old, nil
	}
	if err := s.mayTake(t, d, now); err != nil {
		return e, nil, err
	}
	return e, nil, e.valid(now)
}

// Begin judges an enrolment request and returns the challenge that only the
// genuine TPM can answer. Only what the answer is compared with is stored, for
// a few minutes, so that any verifier may take the answer. Errors of judgement
// are *attest.Refusal.
func (s *Service) Begin(ctx context.Context, r attest.EnrolRequest) (*attest.EnrolChallenge, error) {
	now := s.Now()
	if v, ok := s.shared.revoked.covers(attest.Holder{}); ok {
		return nil, attest.Refuse(attest.ReasonSuspended, "%s", v.Subject())
	}
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
	if _, err := s.Store.Update(ctx, func(t concurrency.STM) error {
		_, _, err := s.admit(t, d, ticket, now)
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
	return &c, s.remember(ctx, session, pending{proof, d, ticket, now.Add(enrolLife)})
}

// remember stores an enrolment under way, which etcd forgets by its lease.
func (s *Service) remember(ctx context.Context, session []byte, p pending) error {
	client := s.Store.Client()
	n, err := client.Get(ctx, s.keys.enrolments(), clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	if n.Count >= maxPending {
		return attest.Refuse(attest.ReasonBusy, "%d enrolments are under way; try again", maxPending)
	}
	lease, err := client.Grant(ctx, int64(enrolLife/time.Second)+60)
	if err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	data, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	if _, err := client.Put(ctx, s.keys.enrolment(session), string(data), clientv3.WithLease(lease.ID)); err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	return nil
}

// Finish enrols the device if it has answered the challenge. A challenge can
// be answered once. Ticket, permit, the uniqueness of both keys and the record
// are one transaction.
func (s *Service) Finish(ctx context.Context, a attest.EnrolAnswer) (*attest.Enrolment, error) {
	now := s.Now()
	if len(a.Session) > maxSession {
		return nil, errNotUnderWay()
	}
	key := s.keys.enrolment(a.Session)
	var d Device
	_, err := s.Store.Update(ctx, func(t concurrency.STM) error {
		p, ok, err := read[pending](t, key)
		switch {
		case err != nil:
			return err
		case !ok || now.After(p.Expires):
			return errNotUnderWay()
		case !hmac.Equal(p.Proof, a.Proof):
			return attest.Refuse(attest.ReasonChallengeFailed, "the device could not prove that its keys are in the TPM it shows")
		}
		t.Del(key)
		d = p.Device
		d.Enrolled = now.UTC().Truncate(time.Second)
		e, known, err := s.admit(t, d, p.Ticket, now)
		if err != nil {
			return err
		}
		if known != nil {
			d = *known
			return nil
		}
		return errors.Join(e.use(), s.take(t, d, now.UTC().Truncate(time.Second)))
	})
	if err != nil {
		// Refused is answered too.
		if _, e := s.Store.Client().Delete(ctx, key); e != nil {
			return nil, errors.Join(err, fmt.Errorf("enrolment: %w", e))
		}
		return nil, err
	}
	return &attest.Enrolment{Device: d.ID, Verifier: s.Verifier, Enrolled: d.Enrolled}, nil
}

func errNotUnderWay() error {
	return attest.Refuse(attest.ReasonChallengeExpired, "no such enrolment under way; begin again")
}

// Challenge gives a nonce to whoever asks: whether the device is enrolled is
// said only to those who hold its key.
func (s *Service) Challenge(r attest.ChallengeRequest) attest.Challenge {
	return attest.Challenge{Nonce: s.nonces.New(r.Device, s.Now()), Verifier: s.Verifier}
}

// Attest appraises encoded evidence. An error means that no appraisal took
// place; a refusal is a response. Only evidence that the device's own TPM has
// signed, for this nonce, changes the store.
func (s *Service) Attest(ctx context.Context, data []byte) (*attest.AttestResponse, error) {
	now := s.Now().Truncate(time.Second)
	resp, err := s.appraise(ctx, data, now)
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

// Results returns the last results, oldest first. After a start they are those
// that have a report in the archive of this verifier.
func (s *Service) Results() []attest.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]attest.Result(nil), s.results...)
}
