package fleet

import (
	"crypto/ecdsa"
	"fmt"
	"path/filepath"

	"sekisho/attest/policy"
)

// openAppraisal opens what appraisal needs beside the registry: keys, policies
// and the archive of reports. Files that the configuration does not name are
// in the store.
func (c *ServerConfig) openAppraisal(to *Config) (err error) {
	inStore := func(name, file string) string {
		if name != "" {
			return name
		}
		return filepath.Join(c.Store, file)
	}
	if to.NonceKey, err = loadNonceKey(inStore(c.NonceKey, "nonce.key")); err != nil {
		return err
	}
	key, err := loadReportKey(inStore(c.ReportKey, "report.key"))
	if err != nil {
		return err
	}
	if to.Reports, err = OpenReports(filepath.Join(c.Store, "reports"), key); err != nil {
		return err
	}
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
