package fleet

import (
	"crypto/ecdsa"
	"fmt"
	"path/filepath"
	"time"

	"sekisho/attest/archive"
	"sekisho/attest/policy"
	"sekisho/attest/store"
)

// What is kept of reports when the configuration does not say.
const (
	defaultDays = 90
	defaultGiB  = 16
)

// inStore is a file of that name, or one in the store if it has none.
func (c *ServerConfig) inStore(name, file string) string {
	if name != "" {
		return name
	}
	return filepath.Join(c.Store, file)
}

// openAppraisal opens what appraisal needs beside the registry: keys, policies
// and the archive of reports. Files that the configuration does not name are
// in the store.
func (c *ServerConfig) openAppraisal(to *Config) (err error) {
	if to.NonceKey, err = loadNonceKey(c.inStore(c.NonceKey, "nonce.key")); err != nil {
		return err
	}
	key, err := loadReportKey(c.inStore(c.ReportKey, "report.key"))
	if err != nil {
		return err
	}
	dir := filepath.Join(c.Store, "archive")
	days, size := c.ReportDays, c.ReportGiB
	if days == 0 {
		days = defaultDays
	}
	if size == 0 {
		size = defaultGiB
	}
	keep := archive.Retention{Bytes: int64(size) << 30, Age: time.Duration(days) * 24 * time.Hour}
	a, err := archive.Open(dir, keep, to.Now, func() error { return store.Room(dir) })
	if err != nil {
		return err
	}
	to.Reports = &Reports{a, key}
	percent := c.MassRefusalPercent
	if percent == 0 {
		percent = defaultPercent
	}
	to.Brake = NewBrake(percent)
	if len(c.PolicyKeys) == 0 {
		return nil
	}
	var keys []*ecdsa.PublicKey
	for _, name := range c.PolicyKeys {
		data, err := readFile(name)
		if err != nil {
			return fmt.Errorf("policy_keys: %w", err)
		}
		k, err := policy.ParseKey(data)
		if err != nil {
			return fmt.Errorf("policy_keys: %s: %w", name, err)
		}
		keys = append(keys, k)
	}
	threshold := c.PolicyThreshold
	if threshold == 0 {
		threshold = len(keys)
	}
	if to.PolicyKeys, err = policy.NewKeyring(threshold, keys...); err != nil {
		return fmt.Errorf("policy_keys: %w", err)
	}
	return nil
}
