package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/store"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/verifier"
)

const name = "verifier.test"

var (
	image = logtest.Image{Kernel: "kernel 1", Initramfs: "initramfs 1", Cmdline: "quiet"}
	start = time.Now().Truncate(time.Second)
)

// bench is a service with one maker of TPMs that it trusts.
type bench struct {
	t       *testing.T
	service *Service
	store   *store.Store
	dir     string
	now     time.Time
	maker   *x509.Certificate
	makeKey *ecdsa.PrivateKey
}

func authority(t testing.TB, cn string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: start.Add(-48 * time.Hour), NotAfter: start.Add(48 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), now: start}
	b.maker, b.makeKey = authority(t, "maker of TPMs")
	roots := ek.NewRoots(b.maker)
	ca, key := authority(t, "devices")
	issuer, err := verifier.NewIssuer(ca, key, "Test City", 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	b.store = openStore(t, filepath.Join(b.dir, storeDir))
	b.use(Config{
		Organization: org, Lifetime: 10 * time.Minute, Verifier: name, Store: b.store, Issuer: issuer, EKRoots: roots,
		References: []attest.ReferenceValues{image.Reference("sekisho", "1")}, Now: func() time.Time { return b.now },
	})
	return b
}

// openStore opens an embedded store until the end of the test.
func openStore(t *testing.T, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// use makes the service of the bench anew, as a restart of the verifier does.
func (b *bench) use(c Config) {
	b.t.Helper()
	if b.service != nil {
		b.service.Close()
	}
	s, err := NewService(b.t.Context(), c)
	if err != nil {
		b.t.Fatal(err)
	}
	b.service = s
	b.t.Cleanup(s.Close)
}

// restart closes the store too, and opens it again.
func (b *bench) restart() {
	b.t.Helper()
	b.service.Close()
	if err := b.store.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.store = openStore(b.t, filepath.Join(b.dir, storeDir))
	c := b.service.Config
	c.Store = b.store
	b.use(c)
}

// device is a TPM of the trusted maker that has booted the image.
func (b *bench) device() *faketpm.TPM {
	b.t.Helper()
	d := faketpm.New()
	d.PCRs = image.Boot().PCRs()
	if err := d.Certify(b.maker, b.makeKey, nil); err != nil {
		b.t.Fatal(err)
	}
	return d
}

func (b *bench) ticket(uses int) string {
	b.t.Helper()
	ticket, _, err := b.service.CreateTicket(b.t.Context(), uses, time.Hour)
	if err != nil {
		b.t.Fatal(err)
	}
	return ticket.Reveal()
}

func request(d *faketpm.TPM, ticket string) attest.EnrolRequest {
	id := d.Identity()
	return attest.EnrolRequest{Ticket: ticket, EKCertificate: id.EKCertificate, EK: id.EK, AK: id.AK}
}

// enrol enrols d; change may alter the exchange on its way.
func (b *bench) enrol(d *faketpm.TPM, ticket string, change func(*attest.EnrolRequest, *attest.EnrolAnswer)) (*attest.Enrolment, error) {
	b.t.Helper()
	if change == nil {
		change = func(*attest.EnrolRequest, *attest.EnrolAnswer) {}
	}
	r := request(d, ticket)
	change(&r, &attest.EnrolAnswer{})
	c, err := b.service.Begin(b.t.Context(), r)
	if err != nil {
		return nil, err
	}
	secret, err := d.Activate(c.Credential, c.Secret)
	if err != nil {
		secret = make([]byte, 32) // a guess
	}
	proof, err := attest.EnrolProof(secret, r, *c)
	if err != nil {
		b.t.Fatal(err)
	}
	a := attest.EnrolAnswer{Session: c.Session, Proof: proof}
	change(&attest.EnrolRequest{}, &a)
	return b.service.Finish(b.t.Context(), a)
}

// evidence answers a challenge for device id with TPM d.
func (b *bench) evidence(d *faketpm.TPM, id attest.Digest, nonce []byte) *attest.Evidence {
	b.t.Helper()
	return b.evidenceOf(d, id, nonce, image)
}

// evidenceOf is evidence with the event log of an image.
func (b *bench) evidenceOf(d *faketpm.TPM, id attest.Digest, nonce []byte, image logtest.Image) *attest.Evidence {
	b.t.Helper()
	_, key := identify(b.t, d)
	e, err := evidenceFor(d, id, key, nonce, image.Boot().Bytes())
	if err != nil {
		b.t.Fatal(err)
	}
	return e
}

// identify returns the device id of d and the SHA-256 of its credential key's
// SubjectPublicKeyInfo.
func identify(t testing.TB, d *faketpm.TPM) (id, credential attest.Digest) {
	t.Helper()
	ek, err := tpm.ParsePublic(d.Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm.ParsePublic(d.Identity().Key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := key.SPKI()
	if err != nil {
		t.Fatal(err)
	}
	return attest.DeviceID(ek.Name()), sha256.Sum256(spki)
}

// evidenceFor is evidence of d, which calls itself id, for a nonce and a key.
func evidenceFor(d *faketpm.TPM, id, key attest.Digest, nonce, log []byte) (*attest.Evidence, error) {
	extra, err := attest.Binding{
		Nonce: nonce, Device: id, Verifier: name, Purpose: attest.PurposeNetwork, Key: key, EventLog: sha256.Sum256(log),
	}.Digest()
	if err != nil {
		return nil, err
	}
	p, err := d.Attest(extra)
	if err != nil {
		return nil, err
	}
	e := &attest.Evidence{
		Profile: attest.Profile, Device: id[:], Verifier: name, Purpose: attest.PurposeNetwork, Nonce: nonce,
		Quote: p.Quote, QuoteSig: p.QuoteSig, PCRs: make(map[int][]byte), EventLog: log,
		Key: d.Identity().Key, Certify: p.Certify, CertifySig: p.CertifySig,
	}
	for i, v := range p.PCRs {
		e.PCRs[i] = v[:]
	}
	return e, nil
}

func (b *bench) nonce(id attest.Digest) []byte {
	return b.service.Challenge(attest.ChallengeRequest{Device: id}).Nonce
}

func (b *bench) attest(e *attest.Evidence) *attest.AttestResponse {
	b.t.Helper()
	data, err := e.Encode()
	if err != nil {
		b.t.Fatal(err)
	}
	r, err := b.service.Attest(b.t.Context(), data)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// stored is all that the store holds, but what an authentic refusal may leave
// (Seen) and enrolments under way, which lapse.
func (b *bench) stored() string {
	b.t.Helper()
	var all strings.Builder
	if _, err := b.store.Scan(b.t.Context(), "/", 0, func(kv *mvccpb.KeyValue) error {
		if k := strings.TrimPrefix(string(kv.Key), string(b.service.keys)); !strings.HasPrefix(k, "seen/") && !strings.HasPrefix(k, "enrolment/") {
			fmt.Fprintf(&all, "%s %s\n", kv.Key, kv.Value)
		}
		return nil
	}); err != nil {
		b.t.Fatal(err)
	}
	return all.String()
}

func (b *bench) devices() []Device {
	b.t.Helper()
	list, err := b.service.Devices(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return list
}

func (b *bench) tickets() []Ticket {
	b.t.Helper()
	list, err := b.service.Tickets(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return list
}

func refusal(t *testing.T, err error) attest.Reason {
	t.Helper()
	if err == nil {
		return attest.ReasonNone
	}
	var r *attest.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("%v is no refusal", err)
	}
	return r.Reason
}

func deviceID(t *testing.T, d *faketpm.TPM) attest.Digest {
	t.Helper()
	id, _ := identify(t, d)
	return id
}

func TestEnrolAndAttest(t *testing.T) {
	b := newBench(t)
	d := b.device()
	e, err := b.enrol(d, b.ticket(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if e.Device != deviceID(t, d) {
		t.Errorf("enrolled as %v", e.Device)
	}
	r := b.attest(b.evidence(d, e.Device, b.nonce(e.Device)))
	if r.Result.Status != attest.StatusAffirming || len(r.Chain) != 1 {
		t.Errorf("%+v", r)
	}
	// What was stored survives a restart of the verifier.
	b.restart()
	if list := b.devices(); len(list) != 1 || list[0].Clock == nil || list[0].Image != "sekisho 1" || list[0].Status != attest.StatusAffirming || len(b.tickets()) != 1 {
		t.Errorf("devices: %+v", list)
	}
}

func TestEnrolRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		attack func(b *bench) error
		want   attest.Reason
	}{
		{"no ticket", func(b *bench) error { _, err := b.enrol(b.device(), "", nil); return err }, attest.ReasonTicketUnknown},
		{"unknown ticket", func(b *bench) error { _, err := b.enrol(b.device(), "ticket-x", nil); return err }, attest.ReasonTicketUnknown},
		{"long ticket", func(b *bench) error {
			_, err := b.enrol(b.device(), string(make([]byte, 5000)), nil)
			return err
		}, attest.ReasonTicketUnknown},
		{"expired ticket", func(b *bench) error {
			ticket := b.ticket(1)
			b.now = b.now.Add(2 * time.Hour)
			_, err := b.enrol(b.device(), ticket, nil)
			return err
		}, attest.ReasonTicketExpired},
		{"no certificate", func(b *bench) error { _, err := b.enrol(faketpm.New(), b.ticket(1), nil); return err }, attest.ReasonEKMissing},
		{"certificate of another maker", func(b *bench) error {
			d := faketpm.New()
			ca, key := authority(b.t, "maker of TPMs")
			if err := d.Certify(ca, key, nil); err != nil {
				b.t.Fatal(err)
			}
			_, err := b.enrol(d, b.ticket(1), nil)
			return err
		}, attest.ReasonEKUntrusted},
		{"certificate of a CA", func(b *bench) error {
			d := faketpm.New()
			if err := d.Certify(b.maker, b.makeKey, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }); err != nil {
				b.t.Fatal(err)
			}
			_, err := b.enrol(d, b.ticket(1), nil)
			return err
		}, attest.ReasonEKUntrusted},
		{"certificate of another TPM", func(b *bench) error {
			_, err := b.enrol(faketpm.New(), b.ticket(1), func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) {
				r.EKCertificate = b.device().Identity().EKCertificate
			})
			return err
		}, attest.ReasonEKMismatch},
		{"EK that signs", func(b *bench) error {
			_, err := b.enrol(b.device(), b.ticket(1), func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) { r.EK = r.AK })
			return err
		}, attest.ReasonEKAttributes},
		{"AK that is not restricted", func(b *bench) error {
			d := b.device()
			_, err := b.enrol(d, b.ticket(1), func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) { r.AK = d.Identity().Key })
			return err
		}, attest.ReasonAKAttributes},
		{"AK of another TPM", func(b *bench) error {
			_, err := b.enrol(b.device(), b.ticket(1), func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) {
				if r.AK != nil {
					r.AK = faketpm.New().Identity().AK
				}
			})
			return err
		}, attest.ReasonChallengeFailed},
		{"wrong proof", func(b *bench) error {
			_, err := b.enrol(b.device(), b.ticket(1), func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) {
				if a.Proof != nil {
					a.Proof[0] ^= 1
				}
			})
			return err
		}, attest.ReasonChallengeFailed},
		{"unknown session", func(b *bench) error {
			_, err := b.enrol(b.device(), b.ticket(1), func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) { a.Session = []byte("x") })
			return err
		}, attest.ReasonChallengeExpired},
		{"late answer", func(b *bench) error {
			_, err := b.enrol(b.device(), b.ticket(1), func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) {
				if a.Proof != nil {
					b.now = b.now.Add(enrolLife + time.Second)
				}
			})
			return err
		}, attest.ReasonChallengeExpired},
	} {
		b := newBench(t)
		err := c.attack(b)
		if got := refusal(t, err); got != c.want {
			t.Errorf("%s: %v (%v), want %v", c.name, got, err, c.want)
		}
		for _, ticket := range b.tickets() {
			if ticket.Uses != 1 {
				t.Errorf("%s: the ticket was used", c.name)
			}
		}
		if len(b.devices()) != 0 {
			t.Errorf("%s: a device was stored", c.name)
		}
	}
}

func TestTicketIsUsedUp(t *testing.T) {
	b := newBench(t)
	ticket := b.ticket(2)
	for range 2 {
		if _, err := b.enrol(b.device(), ticket, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.enrol(b.device(), ticket, nil); refusal(t, err) != attest.ReasonTicketUsed {
		t.Errorf("third use of two: %v", err)
	}
	if bytes.Contains([]byte(b.stored()), []byte(ticket)) {
		t.Error("the ticket is stored in the clear")
	}
}

// TestTicketRace begins two enrolments with one use left: one gets it.
func TestTicketRace(t *testing.T) {
	b := newBench(t)
	ticket := b.ticket(1)
	second := b.device()
	_, err := b.enrol(b.device(), ticket, func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) {
		if a.Proof != nil {
			if _, err := b.enrol(second, ticket, nil); err != nil {
				t.Errorf("the quicker one: %v", err)
			}
		}
	})
	if refusal(t, err) != attest.ReasonTicketUsed {
		t.Errorf("the slower one: %v", err)
	}
}

// TestTakeover enrols a known TPM with another attestation key.
func TestTakeover(t *testing.T) {
	b := newBench(t)
	d := b.device()
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	ticket := b.ticket(1)
	before := b.stored()
	d.Renew()
	if _, err := b.enrol(d, ticket, nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("takeover: %v", err)
	}
	if b.stored() != before {
		t.Error("a refusal changed the store")
	}
}

// TestAttacks is issue 2's table of bad input: each has its own reason, gives
// no certificate, and stores nothing.
func TestAttacks(t *testing.T) {
	for _, c := range []struct {
		name   string
		attack func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence
		want   attest.Reason
	}{
		{"replayed nonce", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			nonce := b.nonce(id)
			b.attest(b.evidence(d, id, nonce))
			return b.evidence(d, id, nonce)
		}, attest.ReasonNonceReused},
		{"replayed evidence", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			e := b.evidence(d, id, b.nonce(id))
			b.attest(e)
			return e
		}, attest.ReasonNonceReused},
		{"expired nonce", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			nonce := b.nonce(id)
			b.now = b.now.Add(verifier.NonceLife + time.Second)
			return b.evidence(d, id, nonce)
		}, attest.ReasonNonceExpired},
		{"nonce of our own making", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			return b.evidence(d, id, make([]byte, 88))
		}, attest.ReasonNonceInvalid},
		{"foreign AK", func(b *bench, _ *faketpm.TPM, id attest.Digest) *attest.Evidence {
			return b.evidence(b.device(), id, b.nonce(id))
		}, attest.ReasonSignatureInvalid},
		{"evidence of another device", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			other := b.device()
			enrolled, err := b.enrol(other, b.ticket(1), nil)
			if err != nil {
				b.t.Fatal(err)
			}
			e := b.evidence(other, enrolled.Device, b.nonce(enrolled.Device))
			e.Device = id[:]
			return e
		}, attest.ReasonDeviceMismatch},
		{"device that is not enrolled", func(b *bench, _ *faketpm.TPM, _ attest.Digest) *attest.Evidence {
			d := b.device()
			id := deviceID(b.t, d)
			return b.evidence(d, id, b.nonce(id))
		}, attest.ReasonDeviceUnknown},
		{"wrong extraData", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			e := b.evidence(d, id, b.nonce(id))
			p, err := d.Attest(attest.Digest{1})
			if err != nil {
				b.t.Fatal(err)
			}
			e.Quote, e.QuoteSig = p.Quote, p.QuoteSig
			return e
		}, attest.ReasonBindingMismatch},
		{"other PCR selection", func(b *bench, d *faketpm.TPM, id attest.Digest) *attest.Evidence {
			e := b.evidence(d, id, b.nonce(id))
			s, err := tpm.ParseStatement(e.Quote)
			if err != nil {
				b.t.Fatal(err)
			}
			e.Quote, e.QuoteSig = d.Quote(attest.Digest(s.ExtraData), func(q *faketpm.Quote) { q.Selections = nil })
			return e
		}, attest.ReasonPCRSelection},
	} {
		b := newBench(t)
		d := b.device()
		enrolled, err := b.enrol(d, b.ticket(1), nil)
		if err != nil {
			t.Fatal(err)
		}
		e := c.attack(b, d, enrolled.Device)
		before := b.stored()
		r := b.attest(e)
		if r.Result.Status != attest.StatusContraindicated || r.Result.Reason != c.want || r.Chain != nil {
			t.Errorf("%s: %v %v (%s), want %v", c.name, r.Result.Status, r.Result.Reason, r.Result.Detail, c.want)
		}
		if b.stored() != before {
			t.Errorf("%s: a refusal changed the store", c.name)
		}
	}
}

func TestMalformedEvidence(t *testing.T) {
	b := newBench(t)
	for want, data := range map[attest.Reason][]byte{
		attest.ReasonEvidenceMalformed: []byte("rubbish"),
		attest.ReasonEvidenceTooLarge:  make([]byte, attest.MaxEvidence+1),
	} {
		r, err := b.service.Attest(b.t.Context(), data)
		if err != nil || r.Result.Reason != want || r.Result.Status != attest.StatusContraindicated {
			t.Errorf("%v: %+v, %v", want, r, err)
		}
	}
	for range maxResults + 10 {
		if _, err := b.service.Attest(b.t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(b.service.Results()); n != maxResults {
		t.Errorf("%d results are kept", n)
	}
}
