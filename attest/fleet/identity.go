package fleet

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/tpm"
)

// ApprovePermit is the type of a permit's approval.
const ApprovePermit = "permit"

// Limits of permits and purchase lists.
const (
	maxPermitLife = 30 * 24 * time.Hour
	maxPurchase   = 100000 // entries of one list
)

// PermitRequest is what two persons sign: this device may enrol anew with
// another attestation key or, with a replacement, that TPM takes this device's
// place (a board was exchanged).
type PermitRequest struct {
	Serial      string         `json:"serial"` // random, so that no two permits are the same
	Device      attest.Digest  `json:"device_id"`
	Replacement *attest.Digest `json:"replacement_id,omitempty"`
	Reason      string         `json:"reason"`
	Expires     time.Time      `json:"expires"`
}

// Permit is a permit that the verifier has accepted. It is good for one
// enrolment.
type Permit struct {
	ID attest.Digest `json:"id"` // of the approval
	PermitRequest
	Signers []string  `json:"signers"` // SHA-256 of their public keys
	Added   time.Time `json:"added"`
	Used    time.Time `json:"used,omitzero"`
}

// subject is whose enrolment the permit is for.
func (p Permit) subject() attest.Digest {
	if p.Replacement != nil {
		return *p.Replacement
	}
	return p.Device
}

// Former is a device's record as it was until a permit replaced it or an
// administrator retired it. Nothing of it is ever removed: it is the audit
// trail.
type Former struct {
	Device
	Ended      time.Time     `json:"ended"`
	Reason     string        `json:"ended_because,omitempty"` // of an administrator
	Permit     attest.Digest `json:"permit,omitzero"`
	ReplacedBy attest.Digest `json:"replaced_by,omitzero"` // the device itself, if only its key was renewed
}

// Purchase is an endorsement key that the organisation has bought: a TPM that
// has it enrols once without a ticket.
type Purchase struct {
	EK     attest.Digest `json:"ek"`
	Source string        `json:"source"` // such as the delivery note
	Added  time.Time     `json:"added"`
	Device attest.Digest `json:"device_id,omitzero"` // that has enrolled by it
}

// AddPermit accepts a permit. A nil error proves: enough different approvers
// have signed it, it has not expired, it was never presented before, and its
// device is known here.
func (s *Service) AddPermit(ctx context.Context, signed *approval.Signed) (Permit, error) {
	payload, who, err := s.Approvers.Verify(ApprovePermit, signed)
	if err != nil {
		return Permit{}, fmt.Errorf("permit: %w", err)
	}
	now := s.Now().UTC()
	p := Permit{ID: signed.ID(), Signers: who, Added: now.Truncate(time.Second)}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&p.PermitRequest); err != nil {
		return Permit{}, fmt.Errorf("permit: %w", err)
	}
	switch {
	case p.Serial == "":
		return Permit{}, errors.New("permit: no serial number")
	case !now.Before(p.Expires):
		return Permit{}, fmt.Errorf("permit: expired at %s; have a new one signed", p.Expires.Format(time.RFC3339))
	case p.Expires.Sub(now) > maxPermitLife:
		return Permit{}, fmt.Errorf("permit: expires at %s: want at most %s from now", p.Expires.Format(time.RFC3339), maxPermitLife)
	case p.Replacement != nil && *p.Replacement == p.Device:
		return Permit{}, errors.New("permit: the replacement is the device itself")
	}
	_, err = s.Store.Update(ctx, func(t concurrency.STM) error {
		list, _, err := read[[]Permit](t, s.keys.permits(p.subject()))
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(list, func(old Permit) bool { return old.ID == p.ID }); i >= 0 {
			return fmt.Errorf("permit: was presented at %s already; have a new one signed", list[i].Added.Format(time.RFC3339))
		}
		if t.Get(s.keys.device(p.Device)) == "" && t.Get(s.keys.former(p.Device)) == "" {
			return fmt.Errorf("permit: device %s is not known here", p.Device)
		}
		return write(t, s.keys.permits(p.subject()), append(list, p))
	})
	return p, err
}

// valid finds the permit by which its subject may enrol now, -1 if there is
// none. Of several, the one that expires first.
func valid(permits []Permit, now time.Time) int {
	found := -1
	for i, p := range permits {
		if p.Used.IsZero() && now.Before(p.Expires) && (found < 0 || p.Expires.Before(permits[found].Expires)) {
			found = i
		}
	}
	return found
}

// mayTake judges whether d may take an identity that someone has or had: its
// own with another key, that of a device that was retired, or an attestation
// key of another device.
func (s *Service) mayTake(t concurrency.STM, d Device, now time.Time) error {
	permits, _, err := read[[]Permit](t, s.keys.permits(d.ID))
	if err != nil {
		return err
	}
	if valid(permits, now) < 0 {
		if t.Get(s.keys.device(d.ID)) != "" {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "device %s is enrolled with another attestation key; it needs a permit with two signatures", d.ID)
		}
		if t.Get(s.keys.former(d.ID)) != "" {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "device %s was retired; it needs a permit with two signatures to come back", d.ID)
		}
	}
	owner, taken, err := read[attest.Digest](t, s.keys.ak(sha256.Sum256(d.AK)))
	if err != nil {
		return err
	}
	if taken && owner != d.ID {
		return attest.Refuse(attest.ReasonAlreadyEnrolled, "attestation key belongs or belonged to device %s", owner)
	}
	return nil
}

// take puts d into the registry, uses up its permit if there is one, and keeps
// the record that d replaces. mayTake must have passed.
func (s *Service) take(t concurrency.STM, d Device, now time.Time) error {
	permits, _, err := read[[]Permit](t, s.keys.permits(d.ID))
	if err != nil {
		return err
	}
	if i := valid(permits, now); i >= 0 {
		p := &permits[i]
		if err := s.end(t, p.Device, Former{Ended: now, Permit: p.ID, ReplacedBy: d.ID}); err != nil && !errors.Is(err, errUnknownDevice) {
			return err
		}
		p.Used = now
		if err := write(t, s.keys.permits(d.ID), permits); err != nil {
			return err
		}
	}
	t.Del(s.keys.seen(d.ID))
	if t.Get(s.keys.revocation(d.ID)) != "" {
		if err := s.revoke(t, d.ID, false); err != nil {
			return err
		}
	}
	return errors.Join(write(t, s.keys.ak(sha256.Sum256(d.AK)), d.ID), write(t, s.keys.device(d.ID), d))
}

// errUnknownDevice says that no such device is enrolled.
var errUnknownDevice = errors.New("no such device is enrolled")

// end takes a device out of the registry; f is kept, with its record.
func (s *Service) end(t concurrency.STM, id attest.Digest, f Former) error {
	d, ok, err := read[Device](t, s.keys.device(id))
	if err == nil && !ok {
		err = fmt.Errorf("device %s: %w", id, errUnknownDevice)
	}
	if err != nil {
		return err
	}
	seen, _, err := read[Seen](t, s.keys.seen(id))
	if err != nil {
		return err
	}
	list, _, err := read[[]Former](t, s.keys.former(id))
	if err != nil {
		return err
	}
	f.Device = d.with(seen)
	t.Del(s.keys.device(id))
	t.Del(s.keys.seen(id))
	t.Del(s.keys.firmware(id))
	if err := s.revoke(t, id, true); err != nil {
		return err
	}
	return write(t, s.keys.former(id), append(list, f))
}

// Retire ends a device: it is affirmed no more, and comes back only by a
// permit. Its record is kept. When Retire has returned, that holds also after
// a crash.
func (s *Service) Retire(ctx context.Context, id attest.Digest, reason string) (Former, error) {
	if reason == "" || len(reason) > attest.MaxName {
		return Former{}, fmt.Errorf("retire device %s: reason of %d bytes, want 1 to %d", id, len(reason), attest.MaxName)
	}
	f := Former{Ended: s.Now().UTC().Truncate(time.Second), Reason: reason}
	if err := s.change(ctx, func(t concurrency.STM) error { return s.end(t, id, f) }); err != nil {
		return Former{}, err
	}
	list, err := s.Former(ctx, id)
	if err != nil || len(list) == 0 {
		return Former{}, errors.Join(err, errUnknownDevice)
	}
	return list[len(list)-1], nil
}

// Former lists the records of a device that were ended, oldest first; those of
// all devices for the zero id.
func (s *Service) Former(ctx context.Context, id attest.Digest) ([]Former, error) {
	list := []Former{}
	if err := scan(ctx, s, "former", func(f []Former) { list = append(list, f...) }); err != nil {
		return nil, err
	}
	if id != (attest.Digest{}) {
		list = slices.DeleteFunc(list, func(f Former) bool { return f.ID != id && f.ReplacedBy != id })
	}
	slices.SortStableFunc(list, func(a, b Former) int { return a.Ended.Compare(b.Ended) })
	return list, nil
}

// Permits lists the permits that were accepted, used ones too, oldest first.
func (s *Service) Permits(ctx context.Context) ([]Permit, error) {
	list := []Permit{}
	err := scan(ctx, s, "permits", func(p []Permit) { list = append(list, p...) })
	slices.SortStableFunc(list, func(a, b Permit) int { return a.Added.Compare(b.Added) })
	return list, err
}

// purchased is the ticket id of devices that enrolled by the purchase list.
const purchased = "purchase"

// bought finds d on the purchase list: by its device id, or by the SHA-256 of
// its EK's SubjectPublicKeyInfo, which is what makers deliver.
func (s *Service) bought(t concurrency.STM, d Device) (p Purchase, key string, err error) {
	key = s.keys.purchase(d.ID)
	p, ok, err := read[Purchase](t, key)
	if ok || err != nil {
		return p, key, err
	}
	ek, err := tpm.ParsePublic(d.EK)
	if err != nil {
		return p, key, attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	spki, err := ek.SPKI()
	if err != nil {
		return p, key, attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	key = s.keys.purchase(sha256.Sum256(spki))
	if p, ok, err = read[Purchase](t, key); err == nil && !ok {
		err = attest.Refuse(attest.ReasonTicketUnknown, "no ticket, and device %s is not on a purchase list; ask for a ticket", d.ID)
	}
	return p, key, err
}

// entry is what a device enrols by.
type entry struct {
	valid func(now time.Time) error // whether it is still good
	use   func() error              // uses it up, in the transaction
}

// entry finds what d enrols by: its place on the purchase list or its ticket.
func (s *Service) entry(t concurrency.STM, d Device, ticket attest.Digest) (entry, error) {
	if d.TicketID != purchased {
		key := s.keys.ticket(ticketID(ticket))
		k, ok, err := read[Ticket](t, key)
		if err != nil {
			return entry{}, err
		}
		if !ok || !hmac.Equal(k.Digest[:], ticket[:]) {
			return entry{}, attest.Refuse(attest.ReasonTicketUnknown, "ticket is not known here; ask for a new one")
		}
		return entry{k.valid, func() error {
			k.Uses--
			return write(t, key, k)
		}}, nil
	}
	p, key, err := s.bought(t, d)
	if err != nil {
		return entry{}, err
	}
	return entry{func(time.Time) error {
		if p.Device != (attest.Digest{}) {
			return attest.Refuse(attest.ReasonTicketUsed, "device %s has enrolled by the purchase list already; ask for a ticket", p.Device)
		}
		return nil
	}, func() error {
		p.Device = d.ID
		return write(t, key, p)
	}}, nil
}

// purchaseBatch is how many entries are added in one transaction.
const purchaseBatch = 50

// AddPurchase puts endorsement keys on the purchase list: device ids, or
// SHA-256 digests of SubjectPublicKeyInfo. Those that stand there stay as they
// are. It returns how many are new; after an error the rest can be added by
// presenting the same list again.
func (s *Service) AddPurchase(ctx context.Context, list []attest.Digest, source string) (added int, err error) {
	if len(list) == 0 || len(list) > maxPurchase {
		return 0, fmt.Errorf("purchase list of %d keys: want 1 to %d", len(list), maxPurchase)
	}
	now := s.Now().UTC().Truncate(time.Second)
	for part := range slices.Chunk(list, purchaseBatch) {
		n := 0
		if _, err := s.Store.Update(ctx, func(t concurrency.STM) error {
			n = 0
			for _, d := range part {
				key := s.keys.purchase(d)
				if t.Get(key) != "" {
					continue
				}
				if err := write(t, key, Purchase{EK: d, Source: source, Added: now}); err != nil {
					return err
				}
				n++
			}
			return nil
		}); err != nil {
			return added, err
		}
		added += n
	}
	return added, nil
}

// Purchase returns the purchase list.
func (s *Service) Purchase(ctx context.Context) (map[attest.Digest]Purchase, error) {
	list := make(map[attest.Digest]Purchase)
	return list, scan(ctx, s, "purchase", func(p Purchase) { list[p.EK] = p })
}

// RevokeTicket makes a ticket worthless at once, also for enrolments under
// way.
func (s *Service) RevokeTicket(ctx context.Context, id string) error {
	_, err := s.Store.Update(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.ticket(id)) == "" {
			return fmt.Errorf("no ticket %.64q", id)
		}
		t.Del(s.keys.ticket(id))
		return nil
	})
	return err
}
