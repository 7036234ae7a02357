package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/tpm"
)

// Identities is what the registry remembers of identities beside the devices
// of today. Nothing of it is ever removed: it is the audit trail.
type Identities struct {
	Permits  map[attest.Digest]Permit   `json:"permits,omitempty"`  // by ID; used ones stay
	Former   []Former                   `json:"former,omitempty"`   // oldest first
	Purchase map[attest.Digest]Purchase `json:"purchase,omitempty"` // by EK digest
}

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

// Former is a device's record as it was until a permit replaced it.
type Former struct {
	Device
	Ended      time.Time     `json:"ended"`
	Permit     attest.Digest `json:"permit"`
	ReplacedBy attest.Digest `json:"replaced_by"` // the device itself, if only its key was renewed
}

// Purchase is an endorsement key that the organisation has bought: a TPM that
// has it enrols once without a ticket.
type Purchase struct {
	Source string        `json:"source"` // such as the delivery note
	Added  time.Time     `json:"added"`
	Device attest.Digest `json:"device_id,omitzero"` // that has enrolled by it
}

// AddPermit accepts a permit. A nil error proves: enough different approvers
// have signed it, it has not expired, it was never presented before, and its
// device is known here.
func (s *Service) AddPermit(signed *approval.Signed) (Permit, error) {
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
	return p, s.Store.Update(func(r *Registry) error {
		if old, ok := r.Permits[p.ID]; ok {
			return fmt.Errorf("permit: was presented at %s already; have a new one signed", old.Added.Format(time.RFC3339))
		}
		if _, ok := r.Devices[p.Device]; !ok && !r.retired(p.Device) {
			return fmt.Errorf("permit: device %s is not known here", p.Device)
		}
		if r.Permits == nil {
			r.Permits = make(map[attest.Digest]Permit)
		}
		r.Permits[p.ID] = p
		return nil
	})
}

// permit finds the permit by which d may enrol now. Of several, the one that
// expires first.
func (i *Identities) permit(id attest.Digest, now time.Time) (found Permit, ok bool) {
	for _, p := range i.Permits {
		if p.subject() == id && p.Used.IsZero() && now.Before(p.Expires) && (!ok || p.Expires.Before(found.Expires)) {
			found, ok = p, true
		}
	}
	return found, ok
}

// retired reports whether a permit has ended this device.
func (i *Identities) retired(id attest.Digest) bool {
	for _, f := range i.Former {
		if f.ID == id {
			return true
		}
	}
	return false
}

// mayTake judges whether d may take an identity that someone has or had: its
// own with another key, that of a device that was retired, or an attestation
// key of another device.
func (r *Registry) mayTake(d Device, now time.Time) error {
	_, enrolled := r.Devices[d.ID]
	if _, permitted := r.permit(d.ID, now); !permitted {
		if enrolled {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "device %s is enrolled with another attestation key; it needs a permit with two signatures", d.ID)
		}
		if r.retired(d.ID) {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "device %s was retired; it needs a permit with two signatures to come back", d.ID)
		}
	}
	for _, other := range r.Devices {
		if other.ID != d.ID && bytes.Equal(other.AK, d.AK) {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "attestation key belongs to device %s", other.ID)
		}
	}
	for _, f := range r.Former {
		if f.ID != d.ID && bytes.Equal(f.AK, d.AK) {
			return attest.Refuse(attest.ReasonAlreadyEnrolled, "attestation key belonged to device %s", f.ID)
		}
	}
	return nil
}

// take puts d into the registry, uses up its permit if there is one, and keeps
// the record that d replaces. mayTake must have passed.
func (r *Registry) take(d Device, now time.Time) {
	if p, ok := r.permit(d.ID, now); ok {
		if old, ok := r.Devices[p.Device]; ok {
			r.Former = append(r.Former, Former{old, now, p.ID, d.ID})
			delete(r.Devices, p.Device)
		}
		p.Used = now
		r.Permits[p.ID] = p
	}
	r.Devices[d.ID] = d
}

// purchased is the ticket id of devices that enrolled by the purchase list.
const purchased = "purchase"

// bought finds d on the purchase list: by its device id, or by the SHA-256 of
// its EK's SubjectPublicKeyInfo, which is what makers deliver.
func (r *Registry) bought(d Device) (key attest.Digest, err error) {
	if _, ok := r.Purchase[d.ID]; ok {
		return d.ID, nil
	}
	ek, err := tpm.ParsePublic(d.EK)
	if err != nil {
		return key, attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	spki, err := ek.SPKI()
	if err != nil {
		return key, attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	key = sha256.Sum256(spki)
	if _, ok := r.Purchase[key]; !ok {
		return key, attest.Refuse(attest.ReasonTicketUnknown, "no ticket, and device %s is not on a purchase list; ask for a ticket", d.ID)
	}
	return key, nil
}

// entry is what a device enrols by.
type entry struct {
	valid func(now time.Time) error // whether it is still good
	use   func()                    // uses it up, in a registry that may be changed
}

// entry finds what d enrols by: its place on the purchase list or its ticket.
func (r *Registry) entry(d Device, ticket attest.Digest) (entry, error) {
	if d.TicketID != purchased {
		t, err := findTicket(r, ticket)
		if err != nil {
			return entry{}, err
		}
		return entry{t.valid, func() {
			t.Uses--
			r.Tickets[t.ID] = t
		}}, nil
	}
	key, err := r.bought(d)
	if err != nil {
		return entry{}, err
	}
	p := r.Purchase[key]
	return entry{func(time.Time) error {
		if p.Device != (attest.Digest{}) {
			return attest.Refuse(attest.ReasonTicketUsed, "device %s has enrolled by the purchase list already; ask for a ticket", p.Device)
		}
		return nil
	}, func() {
		p.Device = d.ID
		r.Purchase[key] = p
	}}, nil
}

// AddPurchase puts endorsement keys on the purchase list: device ids, or
// SHA-256 digests of SubjectPublicKeyInfo. Those that stand there stay as they
// are. It returns how many are new.
func (s *Service) AddPurchase(keys []attest.Digest, source string) (added int, err error) {
	if len(keys) == 0 || len(keys) > maxPurchase {
		return 0, fmt.Errorf("purchase list of %d keys: want 1 to %d", len(keys), maxPurchase)
	}
	now := s.Now().UTC().Truncate(time.Second)
	return added, s.Store.Update(func(r *Registry) error {
		added = 0
		if r.Purchase == nil {
			r.Purchase = make(map[attest.Digest]Purchase)
		}
		for _, k := range keys {
			if _, ok := r.Purchase[k]; !ok {
				r.Purchase[k] = Purchase{Source: source, Added: now}
				added++
			}
		}
		return nil
	})
}

// RevokeTicket makes a ticket worthless at once, also for enrolments under
// way.
func (s *Service) RevokeTicket(id string) error {
	return s.Store.Update(func(r *Registry) error {
		if _, ok := r.Tickets[id]; !ok {
			return fmt.Errorf("no ticket %.64q", id)
		}
		delete(r.Tickets, id)
		return nil
	})
}
